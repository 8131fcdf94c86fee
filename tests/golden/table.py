"""Tensors by name, and the C++ file that holds them."""

import pathlib

import torch

import philox

KEY = philox.key_of(42, "golden", 3)
FIRST = (1 << 32) + 7  # the global id of token 0


def inputs(name, *shape, scale=1.0, base=0.0):
    """Numbers of three decimals in base ± scale, from the draws themselves: the same on every machine, short in print."""
    key = philox.key_of(1, name, 0)
    n = 1
    for size in shape:
        n *= size
    values = [round(base + scale * (2 * philox.uniform(key, philox.SAMPLING, 0, i) - 1), 3) for i in range(n)]
    return torch.tensor(values).reshape(shape)


def keep_mask(T, d, p, key=KEY):
    """keep/(1−p̄) [T, d]."""
    kept = torch.tensor([philox.keep(key, FIRST + t, d, p) for t in range(T)], dtype=torch.float64)
    return kept / (1 - philox.p16_of(p) / 65536)


class Table:
    """What one file holds. Results of a variant are named variant/tensor."""

    def __init__(self, name):
        self.name, self.tensors = name, {}

    def add(self, name, value):
        assert name not in self.tensors, name
        value = torch.as_tensor(value).detach()
        self.tensors[name] = value.reshape(1, -1) if value.dim() < 2 else value
        return value

    def leaves(self, **values):
        """Adds inputs; a dunder in a name stands for a dot. Returns them as a dictionary."""
        given = {name.replace("__", "."): value for name, value in values.items()}
        for name, value in given.items():
            self.add(name, value)
        return given

    def run(self, variant, leaves, dy, forward, store=True):
        """y = forward(leaves that want gradients) and the gradients of ⟨dy, y⟩ (+ the loss that forward may return)."""
        p = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        result = forward(p)
        y, loss = result if isinstance(result, tuple) else (result, 0)
        ((y * dy).sum() + loss).backward()
        out = {"y": y.detach()}
        for name, leaf in p.items():
            out["d." + name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if store:
            for name, value in out.items():
                self.add(f"{variant}/{name}", value)
        return out

    def write(self, folder):
        lines = ["// Written by golden/make.py: name rows columns, and the values row by row.", "#pragma once", "",
                 "namespace loramix_test::golden {", "", f'inline constexpr char {self.name}[] = R"(']
        for name, value in self.tensors.items():
            line = f"{name} {value.shape[0]} {value.shape[1]}"
            assert torch.isfinite(value).all(), name
            for number in value.double().reshape(-1).tolist():
                text = f"{number + 0.0:.13g}"  # no -0
                if len(line) + 1 + len(text) > 118:
                    lines.append(line)
                    line = text
                else:
                    line += " " + text
            lines.append(line)
        lines += [')";', "", "}  // namespace loramix_test::golden", ""]
        text = "\n".join(lines)
        (pathlib.Path(folder) / f"{self.name}.hpp").write_text(text)
        return len(text)
