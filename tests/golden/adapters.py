"""Every adapter of MATH.md section 4 as an equation in float64. Written from that text alone; gradients are autograd's.

A function takes p, the leaves (x and the parameters, by name), and xh = x ∘ keep/(1−p̄), and returns ΔY (or Y).
"""

import math

import torch
from torch.nn.functional import silu, softmax, softplus

from philox import JITTER, NOISE, normal, uniform


def lora(p, xh, s):
    return s * xh @ p["lora_A.weight"].T @ p["lora_B.weight"].T


def fused(p, xh, s, slices, d_out, shared):
    y = torch.zeros(xh.shape[0], d_out)
    for i, (begin, width) in enumerate(slices):
        A = p["lora_A.weight"] if shared else p[f"slice{i}.lora_A.weight"]
        y = y + torch.nn.functional.pad(s * xh @ A.T @ p[f"slice{i}.lora_B.weight"].T, (begin, d_out - begin - width))
    return y


def mixture(p, xh, s, g, shared_A=False):
    """ΔY = s Σ_e g_e (X̂ A_eᵀ) B_eᵀ with g [T, E]."""
    A, B = p["lora_A.weight"], p["lora_B.weight"]
    E, y = g.shape[1], 0
    r = B.shape[1] // E
    for e in range(E):
        A_e = A if shared_A else A[e * r : (e + 1) * r]
        y = y + g[:, e : e + 1] * (s * xh @ A_e.T @ B[:, e * r : (e + 1) * r].T)
    return y


def softmax_gate(p):
    return softmax(p["x"] @ p["moe_gate.weight"].T, dim=1)


def descending(values):
    """Indices from large to small, compared as float, ties to the lower; and that no choice is a close one."""
    order = sorted(range(len(values)), key=lambda e: (-float(torch.tensor(values[e], dtype=torch.float32)), e))
    for a, b in zip(order, order[1:]):
        assert values[a] - values[b] >= 1e-3, "a margin below 1e-3"
    return order


def top_k_gate(p, key, first, k=2, score="softmax", renormalise=True, tau=1.0, route_scale=1.0, top_p=0.0, bias=None,
               noise=False, jitter=0.0, capacity=0.0, priority=False, valid=None):
    """MATH.md section 2: top-k, noise, top-p, bias for selection, capacity, jitter. Returns g [T, E] dense."""
    x, W = p["x"], p["moe_gate.weight"]
    T, d = x.shape
    if jitter:
        x = x * torch.tensor([[1 - jitter + 2 * jitter * uniform(key, JITTER, first + t, i) for i in range(d)]
                              for t in range(T)])
    logits = x @ W.T
    if noise:
        E = W.shape[0] // 2
        n = torch.tensor([[normal(key, NOISE, first + t, e) for e in range(E)] for t in range(T)])
        logits = logits[:, :E] + n * (softplus(logits[:, E:]) + 0.01)
    E = logits.shape[1]
    full = softmax(logits / tau, dim=1)
    scores = full if score == "softmax" else torch.sigmoid(logits)
    chosen, rows = [], []
    for t in range(T):
        by = logits[t] if bias is None else scores[t] + torch.tensor(bias)
        ids = descending(by.tolist())[:k]
        if top_p:
            total, n = 0.0, 0
            while n < k and total < top_p:
                total += full[t, ids[n]].item()
                n += 1
            ids = ids[:n]
        chosen.append(ids)
        q = torch.stack([scores[t, e] for e in ids])
        rows.append(route_scale * (q / q.sum() if renormalise else q))
    kept = [[True] * len(ids) for ids in chosen]
    if capacity:
        ok = [t for t in range(T) if valid is None or valid[t]]
        C = math.ceil(capacity * k * len(ok) / E - 1e-6)
        choices = [(t, s) for t in ok for s in range(len(chosen[t]))]
        if priority:
            choices.sort(key=lambda c: (-rows[c[0]][c[1]].item(), c))
        taken = [0] * E
        for t, s in choices:
            e = chosen[t][s]
            kept[t][s] = taken[e] < C
            taken[e] += 1
        assert not all(map(all, kept)), "nothing was dropped"
    g = []
    for t in range(T):
        row = [torch.zeros(())] * E
        for s, e in enumerate(chosen[t]):
            if kept[t][s]:
                row[e] = rows[t][s]
        g.append(torch.stack(row))
    return torch.stack(g)


def competition(p, kind="mlp", form="learned"):
    """ω = M softmax(S(x)) of section 3."""
    h = p["x"] @ p["shapley.0.weight"].T
    if kind == "mlp":
        h = silu(h + p["shapley.0.bias"]) @ p["shapley.2.weight"].T
    phi = softmax(h + p["shapley.2.bias"], dim=1)
    if form == "equal":
        phi = torch.full_like(phi, 1 / phi.shape[1])
    return phi if form == "identity" else phi @ p["interaction.weight"].T


def moe_lora(p, xh, s, tasks, shared_A=False):
    g = softmax(p["task_embedding.weight"] @ p["moe_gate.weight"].T, dim=1)
    return mixture(p, xh, s, g[tasks], shared_A)


class RowRatio(torch.autograd.Function):
    """The identity, whose gradient is multiplied with a constant."""

    @staticmethod
    def forward(ctx, value, ratio):
        ctx.ratio = ratio
        return value.clone()

    @staticmethod
    def backward(ctx, d):
        return d * ctx.ratio, None


def more(p, xh, s, tasks, law, raw=False, through=True):
    A, B = p["lora_A.weight"], p["lora_B.weight"]
    R = A.shape[0]
    j = torch.arange(1, R + 1, dtype=torch.float64) / R
    if law == "lr_linear":
        A, B = RowRatio.apply(A, j[:, None]), RowRatio.apply(B, j[None, :])
    logits = p["task_embedding.weight"] @ p["gate.weight"].T + p["gate.bias"]
    prob = softmax(logits, dim=1)
    rows = []
    for t, task in enumerate(tasks):
        c = descending(logits[task].tolist())[0]
        r = c + 1
        of = logits[task, c] if raw else prob[task, c]
        m = 1 + of - of.detach() if through else torch.ones(())
        scale = {"paper_linear": torch.full((r,), r / R), "code_squared": (j * j)[:r]}.get(law, torch.ones(r))
        rows.append(s * m * ((xh[t] @ A[:r].T) * scale) @ B[:, :r].T)
    return torch.stack(rows)


def ranks_of(p):
    logits = p["task_embedding.weight"] @ p["gate.weight"].T + p["gate.bias"]
    return [descending(row)[0] + 1 for row in logits.tolist()]


def moa(p, xh, s, sequences, valid, labels, eta, last=False, multiplier=False):
    """ΔY with the label's expert (label −1: the argmax, gate 1), and the routing CE with its weight."""
    A, B, W, b = p["lora_A.weight"], p["lora_B.weight"], p["moe_gate.weight"], p["moe_gate.bias"]
    E = W.shape[0]
    r = A.shape[0] // E
    y, losses = [None] * xh.shape[0], []
    for (begin, end), label in zip(sequences, labels):
        rows = [t for t in range(begin, end) if valid[t]]
        v = p["x"][rows[-1]] if last else p["x"][rows].mean(dim=0)
        logits = W @ v + b[0]
        e, m = label, torch.ones(())
        if label < 0 or multiplier:
            e = descending(logits.tolist())[0]
        if multiplier:
            prob = softmax(logits, dim=0)[e]
            m = 1 + prob - prob.detach()
        if label >= 0:
            losses.append(torch.logsumexp(logits, 0) - logits[label])
        for t in range(begin, end):
            y[t] = m * s * xh[t] @ A[e * r : (e + 1) * r].T @ B[:, e * r : (e + 1) * r].T
    ce = sum(losses) / len(losses)
    return torch.stack(y), eta * ce, ce


def mix_lora(p, xh, key_mask, s, r, k=2):
    """The block: y = W2(Σ g_e h_e) + Σ g_e Δ2_e ĥ_e, h_e = SiLU(W1 x + Δ1_e x̂) ∘ (W3 x + Δ3_e x̂); top-k (a)."""
    x = p["x"]
    logits = x @ p["moe_gate.weight"].T
    E = logits.shape[1]

    def delta(i, e, v):
        ranks = slice(e * r, (e + 1) * r)
        return s * v @ p[f"{i}.lora_A.weight"][ranks].T @ p[f"{i}.lora_B.weight"][:, ranks].T

    y = []
    for t in range(x.shape[0]):
        ids = descending(logits[t].tolist())[:k]
        g = softmax(torch.stack([logits[t, e] for e in ids]), dim=0)
        total, extra = 0, 0
        for slot, e in enumerate(ids):
            h = silu(p["W1"] @ x[t] + delta("gate_proj", e, xh[t])) * (p["W3"] @ x[t] + delta("up_proj", e, xh[t]))
            total = total + g[slot] * h
            extra = extra + g[slot] * delta("down_proj", e, h * key_mask[t])
        y.append(p["W2"] @ total + extra)
    return torch.stack(y)


def ada_lora(p, xh, s):
    return s * (xh @ p["lora_A.weight"].T * p["lora_E"][0]) @ p["lora_B.weight"].T


def frobenius(m):
    return (m * m).sum().sqrt()


def orthogonality(pairs):
    """Mean over layers of ‖BᵀB − I‖_F + ‖AAᵀ − I‖_F."""
    total = 0
    for A, B in pairs:
        I = torch.eye(A.shape[0])
        total = total + frobenius(B.T @ B - I) + frobenius(A @ A.T - I)
    return total / len(pairs)


def dora(p, x, xh, s, drop_base=False):
    """Y₀ + ΔY = what a DoRA layer gives (bias-free); n constant in the gradient. Returns ΔY."""
    W, A, B, m = p["W"], p["lora_A.weight"], p["lora_B.weight"], p["lora_magnitude_vector.weight"][0]
    n = ((W + s * B @ A) ** 2).sum(dim=1).sqrt().detach()
    base = (xh if drop_base else x) @ W.T
    return (m / n - 1) * base + (m / n) * (s * xh @ A.T @ B.T)


def mos_lora(p, xh, s):
    return s * xh @ p["lora_A.weight"].T @ p["mixer"] @ p["lora_B.weight"].T


def multi_lora(p, xh, s, n):
    A, B, gamma, y = p["lora_A.weight"], p["lora_B.weight"], p["gamma"], 0
    r = A.shape[0] // n
    for i in range(n):
        y = y + gamma[i] * (s * xh @ A[i * r : (i + 1) * r].T @ B[:, i * r : (i + 1) * r].T)
    return y


def ia3(p, feedforward):
    l, x, W = p["ia3_l"][0], p["x"], p["W"]
    return (x * (l - 1)) @ W.T if feedforward else (l - 1) * (x @ W.T)


def prompt(p, sequences):
    """v rows before each sequence."""
    return torch.cat([torch.cat([p["prompt_embeddings"], p["x"][b:e]]) for b, e in sequences])
