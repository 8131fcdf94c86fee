#!/usr/bin/env python3
"""Writes data/*.hpp: every method of MATH.md in float64, by another framework, and by PEFT itself where it is right.

    python3 -m venv v && v/bin/pip install -r tests/golden/requirements.txt && v/bin/python tests/golden/make.py

Tests include the results; nobody needs to run this. The same versions write the same bytes.
"""

import itertools
import math
import pathlib
import sys

import torch

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

import adapters as ad
import losses
import peft_layers
import philox
from table import FIRST, KEY, Table, inputs, keep_mask

T, D, O, E, R = 5, 7, 6, 3, 2
TABLES = []


def table(name):
    TABLES.append(Table(name))
    return TABLES[-1]


def batch(t, tokens=T, outputs=O, p=0.5):
    """x, dy and the mask of dropout 1/2 of the key (42, "golden", 3), token FIRST."""
    x = t.add("x", inputs(t.name + " x", tokens, D, scale=2.0))
    dy = t.add("dy", inputs(t.name + " dy", tokens, outputs))
    return x, dy, keep_mask(tokens, D, p)


def near(name, ours, theirs):
    """The framework's own layer against the equation."""
    for key, want in theirs.items():
        error = (ours[key] - want).abs().max().item()
        assert error <= 1e-12 * max(1.0, want.abs().max().item()), f"{name} {key}: {error}"


def lora():
    t = table("lora")
    x, dy, mask = batch(t)
    p = t.leaves(lora_A__weight=inputs("lora A", R, D), lora_B__weight=inputs("lora B", O, R))
    p["x"] = x
    for variant, s, m in [("dropout", 3 / R, mask), ("none", 3 / R, torch.ones(T, D)), ("rslora", 3 / R**0.5, mask)]:
        out = t.run(variant, p, dy, lambda q: ad.lora(q, q["x"] * m, s))
        theirs = peft_layers.lora(p, dy, m, R, 3, rslora=variant == "rslora")
        near("lora " + variant, out, theirs)
        if variant != "none":
            for name, value in theirs.items():
                t.add(f"peft_{variant}/{name}", value)


def fused():
    t = table("fused_lora")
    slices, width = [(5, 3), (0, 2), (2, 2)], 9  # column 4 belongs to no slice
    x, dy, mask = batch(t, outputs=width)
    B = {f"slice{i}.lora_B.weight": t.add(f"slice{i}.lora_B.weight", inputs(f"fused B{i}", w, R))
         for i, (_, w) in enumerate(slices)}
    A = {f"slice{i}.lora_A.weight": t.add(f"slice{i}.lora_A.weight", inputs(f"fused A{i}", R, D)) for i in range(3)}
    one = {"lora_A.weight": t.add("lora_A.weight", inputs("fused A", R, D))}
    t.run("separate", {"x": x, **A, **B}, dy, lambda q: ad.fused(q, q["x"] * mask, 5 / R, slices, width, False))
    t.run("shared", {"x": x, **one, **B}, dy, lambda q: ad.fused(q, q["x"] * mask, 5 / R, slices, width, True))


def dense_mixtures():
    for name, shared in [("lora_moe", False), ("hydra_lora", True)]:
        t = table(name)
        x, dy, mask = batch(t)
        p = t.leaves(lora_A__weight=inputs(name + " A", R if shared else E * R, D),
                     lora_B__weight=inputs(name + " B", O, E * R), moe_gate__weight=inputs(name + " gate", E, D))
        t.run("a", {"x": x, **p}, dy, lambda q: ad.mixture(q, q["x"] * mask, 3 / R, ad.softmax_gate(q), shared))


def mola():
    t, experts = table("mola"), 5
    x, dy, mask = batch(t)
    p = t.leaves(lora_A__weight=inputs("mola A", experts * R, D, scale=0.5),
                 lora_B__weight=inputs("mola B", O, experts * R), moe_gate__weight=inputs("mola gate", experts, D))
    p["x"] = x
    noise_rows = inputs("mola noise", experts, D, scale=0.4)
    noise = t.add("noise.moe_gate.weight", torch.cat([p["moe_gate.weight"], noise_rows]))
    bias, valid = [0.25, -0.375, 0.5, -0.125, 0.0625], [1, 1, 0, 1, 1]
    t.add("bias", bias)
    t.add("valid", valid)
    variants = {
        "renormalised": {},
        "temperature": dict(tau=0.7, renormalise=False),
        "switch": dict(k=1, renormalise=False),
        "sigmoid": dict(score="sigmoid", route_scale=1.5),
        "sigmoid_raw": dict(score="sigmoid", renormalise=False, k=3),
        "top_p": dict(k=experts, top_p=0.8, renormalise=True),
        "bias": dict(score="sigmoid", bias=bias),
        "noise": dict(noise=True),
        "jitter": dict(jitter=0.25),
        "capacity": dict(capacity=0.75, valid=valid),
        "priority": dict(capacity=0.75, priority=True, valid=valid),
    }
    for variant, rule in variants.items():
        leaves = dict(p, **{"moe_gate.weight": noise}) if variant == "noise" else p
        t.run(variant, leaves, dy,
              lambda q: ad.mixture(q, q["x"] * mask, 3 / R, ad.top_k_gate(q, KEY, FIRST, **rule)))


def team_lora():
    t, hidden = table("team_lora"), 5
    x, dy, mask = batch(t)
    p = t.leaves(lora_A__weight=inputs("team A", E * R, D), lora_B__weight=inputs("team B", O, E * R),
                 interaction__weight=inputs("team M", E, E), shapley__2__bias=inputs("team b2", 1, E))
    p["x"] = x
    mlp = {"shapley.0.weight": t.add("mlp.shapley.0.weight", inputs("team S1", hidden, D)),
           "shapley.0.bias": t.add("mlp.shapley.0.bias", inputs("team b1", 1, hidden)),
           "shapley.2.weight": t.add("mlp.shapley.2.weight", inputs("team S2", E, hidden))}
    linear = {"shapley.0.weight": t.add("linear.shapley.0.weight", inputs("team S", E, D))}
    for variant, extra, form in [("mlp", mlp, "learned"), ("linear", linear, "learned"),
                                 ("identity", linear, "identity"), ("equal", linear, "equal")]:
        kind = "mlp" if variant == "mlp" else "linear"
        t.run(variant, {**p, **extra}, dy,
              lambda q: ad.mixture(q, q["x"] * mask, 3 / R, ad.competition(q, kind, form)))


def moe_lora():
    t, tasks = table("moe_lora"), [0, 2, 1, 1, 0]  # task 3 has no token
    x, dy, mask = batch(t)
    t.add("tasks", tasks)
    p = t.leaves(lora_B__weight=inputs("moelora B", O, E * R), task_embedding__weight=inputs("moelora e", 4, 5),
                 moe_gate__weight=inputs("moelora gate", E, 5))
    p["x"] = x
    own = {"lora_A.weight": t.add("own.lora_A.weight", inputs("moelora A", E * R, D))}
    one = {"lora_A.weight": t.add("shared.lora_A.weight", inputs("moelora A1", R, D))}
    for variant, A in [("own", own), ("shared", one)]:
        t.run(variant, {**p, **A}, dy,
              lambda q: ad.moe_lora(q, q["x"] * mask, 3 / (E * R), tasks, variant == "shared"))


def more():
    t, tasks, top = table("more"), [0, 2, 1, 1, 0], 4
    x, dy, mask = batch(t)
    t.add("tasks", tasks)
    p = t.leaves(lora_A__weight=inputs("more A", top, D), lora_B__weight=inputs("more B", O, top),
                 task_embedding__weight=inputs("more e3", 3, D), gate__weight=inputs("more gate", top, D),
                 gate__bias=inputs("more bias", 1, top))
    t.add("ranks", ad.ranks_of(p))
    p["x"] = x
    for variant, options in {"paper_linear": {}, "code_squared": {}, "lr_linear": {}, "none": {},
                             "raw_logit": {"raw": True}, "constant": {"through": False}}.items():
        law = variant if variant not in ("raw_logit", "constant") else "paper_linear"
        t.run(variant, p, dy, lambda q: ad.more(q, q["x"] * mask, 3 / top, tasks, law, **options))


def moa():
    t, sequences = table("moa"), [(0, 3), (3, 5), (5, 7)]
    x, dy, mask = batch(t, tokens=7)
    t.add("offsets", [0, 3, 5, 7])
    valid = t.add("valid", [1, 1, 0, 1, 1, 0, 1]).tolist()
    labels = t.add("labels", [2, -1, 0]).tolist()
    p = t.leaves(lora_A__weight=inputs("moa A", E * R, D), lora_B__weight=inputs("moa B", O, E * R),
                 moe_gate__weight=inputs("moa gate", E, D), moe_gate__bias=inputs("moa bias", 1, E))
    p["x"] = x

    def with_ce(variant, **options):
        def forward(q):
            y, loss, ce = ad.moa(q, q["x"] * mask, 3 / R, sequences, valid, labels, 0.75, **options)
            t.add(variant + "/ce", ce)
            return y, loss

        t.run(variant, p, dy, forward)

    with_ce("mean")
    with_ce("last", last=True)

    def unlabelled(q):  # the ablation: no label, no CE, the multiplier
        return ad.moa(q, q["x"] * mask, 3 / R, sequences, valid, [-1, -1, 0], 0.0, multiplier=True)[0]

    t.run("argmax", p, dy, unlabelled)


def mix_lora():
    t, hidden = table("mix_lora"), 6
    x, dy, mask = batch(t, outputs=D)
    down = keep_mask(T, hidden, 0.5, philox.key_of(42, "golden.down", 3))
    p = {"x": x, **{name: t.add(name, value) for name, value in {
        "W1": inputs("mix W1", hidden, D), "W3": inputs("mix W3", hidden, D), "W2": inputs("mix W2", D, hidden),
        "moe_gate.weight": inputs("mix gate", E, D)}.items()}}
    for i, (a, b) in {"gate_proj": (D, hidden), "up_proj": (D, hidden), "down_proj": (hidden, D)}.items():
        p[f"{i}.lora_A.weight"] = t.add(f"{i}.lora_A.weight", inputs(f"mix A {i}", E * R, a))
        p[f"{i}.lora_B.weight"] = t.add(f"{i}.lora_B.weight", inputs(f"mix B {i}", b, E * R))
    t.run("a", p, dy, lambda q: ad.mix_lora(q, q["x"] * mask, down, 1.5, R))


def ada_lora():
    t = table("ada_lora")
    x, dy, mask = batch(t)
    p = t.leaves(lora_A__weight=inputs("ada A", R, D), lora_B__weight=inputs("ada B", O, R),
                 lora_E=torch.tensor([[0.625, -0.375]]))
    p["x"] = x
    out = t.run("dropout", p, dy, lambda q: ad.ada_lora(q, q["x"] * mask, 3 / R))
    theirs = peft_layers.ada_lora(p, dy, mask, R, 3)  # its scale is α/(r + 1e-5)
    near("adalora", t.run("", p, dy, lambda q: ad.ada_lora(q, q["x"] * mask, 3 / (R + 1e-5)), store=False), theirs)
    for name, value in theirs.items():
        t.add("peft/" + name, value)
    # Orthogonality of two layers, and PEFT's, half of it.
    second = t.leaves(second__A=inputs("ada A2", R, D), second__B=inputs("ada B2", O, R))
    leaves = {name: value.clone().requires_grad_() for name, value in {**p, **second}.items()}
    value = ad.orthogonality([(leaves["lora_A.weight"], leaves["lora_B.weight"]),
                              (leaves["second.A"], leaves["second.B"])])
    value.backward()
    t.add("orthogonality/value", value)
    t.add("orthogonality/peft_value", peft_layers.orthogonality(p, second, R))
    assert abs(t.tensors["orthogonality/peft_value"].item() * 2 - value.item()) < 1e-12
    for name in ("lora_A.weight", "lora_B.weight", "second.A", "second.B"):
        t.add("orthogonality/d." + name, leaves[name].grad)
    # Two steps of sensitivity and uncertainty of A, B and λ, with the gradients of the run above, then half of them.
    for name in ("lora_A.weight", "lora_B.weight", "lora_E"):
        I, U = torch.zeros_like(p[name]), torch.zeros_like(p[name])
        for factor in (1.0, 0.5):
            now = (p[name] * factor * out["d." + name]).abs()
            I = 0.85 * I + 0.15 * now
            U = 0.85 * U + 0.15 * (now - I).abs()
        t.add("importance/" + name, I * U)
    S = {n: t.tensors["importance/" + n] for n in ("lora_A.weight", "lora_B.weight", "lora_E")}
    t.add("importance/score", S["lora_E"][0] + S["lora_A.weight"].mean(dim=1) + S["lora_B.weight"].mean(dim=0))
    b0, bT, N, ni, nf = 24, 8, 20, 4, 6
    budget = [b0 if n < ni else bT if n >= N - nf else bT + (b0 - bT) * (1 - (n - ni) / (N - nf - ni)) ** 3
              for n in range(N + 1)]
    t.add("budget", [float(int(b)) for b in budget])
    assert peft_layers.budget(b0, bT, N, ni, nf) == [int(b) for b in budget]


def dora():
    t = table("dora")
    x, dy, mask = batch(t)
    p = t.leaves(W=inputs("dora W", O, D), lora_A__weight=inputs("dora A", R, D), lora_B__weight=inputs("dora B", O, R),
                 lora_magnitude_vector__weight=inputs("dora m", 1, O, scale=0.5, base=1.5))
    p["x"] = x
    s, ones = 3 / R, torch.ones(T, D)
    for variant, m, drop in [("none", ones, False), ("dropout", mask, False), ("drop_base", mask, True)]:
        out = t.run(variant, p, dy, lambda q: ad.dora(q, q["x"], q["x"] * m, s, drop))
        if variant != "dropout":
            theirs = peft_layers.dora(p, dy, m, R, 3)
            near("dora " + variant, out, theirs)
            for name, value in theirs.items():
                t.add(f"peft_{variant}/{name}", value)


def small_methods():
    t = table("mos_lora")
    x, dy, mask = batch(t)
    p = t.leaves(lora_A__weight=inputs("mos A", R, D), lora_B__weight=inputs("mos B", O, R),
                 mixer=inputs("mos S", R, R))
    t.run("a", {"x": x, **p}, dy, lambda q: ad.mos_lora(q, q["x"] * mask, 3 / R))

    t = table("multi_lora")
    x, dy, mask = batch(t)
    p = t.leaves(lora_A__weight=inputs("multi A", E * R, D), lora_B__weight=inputs("multi B", O, E * R),
                 gamma=inputs("multi gamma", E, O))
    t.run("a", {"x": x, **p}, dy, lambda q: ad.multi_lora(q, q["x"] * mask, 3 / R, E))

    t = table("ia3")
    x, dy, _ = batch(t)
    W = t.add("W", inputs("ia3 W", O, D))
    for variant, width in [("output", O), ("feedforward", D)]:
        l = t.add(variant + ".ia3_l", inputs("ia3 " + variant, 1, width, scale=0.5, base=1))
        p = {"x": x, "W": W, "ia3_l": l}
        out = t.run(variant, p, dy, lambda q: ad.ia3(q, variant == "feedforward"))
        theirs = peft_layers.ia3(p, dy, variant == "feedforward")
        near("ia3 " + variant, out, theirs)
        for name, value in theirs.items():
            t.add(f"peft_{variant}/{name}", value)

    t, sequences, v = table("prompt_tuning"), [(0, 2), (2, 5)], 2
    x = t.add("x", inputs("prompt x", T, D))
    dy = t.add("dy", inputs("prompt dy", T + v * len(sequences), D))
    t.add("offsets", [0, 2, 5])
    p = {"x": x, **t.leaves(prompt_embeddings=inputs("prompt rows", v, D))}
    t.run("a", p, dy, lambda q: ad.prompt(q, sequences))
    # PEFT has one length: two sequences of two rows.
    short = {"x": x[:4], "prompt_embeddings": p["prompt_embeddings"]}
    out = t.run("two", short, dy[:8], lambda q: ad.prompt(q, [(0, 2), (2, 4)]))
    theirs = peft_layers.prompt(short, dy[:8])
    near("prompt", out, theirs)
    for name, value in theirs.items():
        t.add("peft_two/" + name, value)


def loss_values():
    t, rows, experts = table("losses"), 7, 4
    logits = t.add("logits", inputs("loss logits", rows, experts, scale=2.0))
    valid = t.add("valid", [0, 1, 1, 1, 1, 0, 1]).tolist()
    good = [i for i in range(rows) if valid[i]]
    sequences, types = [(0, 3), (3, 5), (5, 7)], [1, 0, 1]
    t.add("offsets", [0, 3, 5, 7])
    t.add("types", types)
    chosen = [ad.descending(row)[:2] for row in logits.tolist()]
    t.add("chosen", chosen)
    first = [ids[:1] for ids in chosen]

    def of(name, leaf, f):
        """Value and gradient with respect to p or the logits."""
        q = leaf.clone().requires_grad_()
        value = f(q)
        value.backward()
        t.add(name + "/value", value)
        t.add(name + "/d", q.grad)

    p = t.add("p", ad.softmax(logits, dim=1))
    of("switch", p, lambda q: losses.balance("switch", q, first, good))
    of("mixtral", p, lambda q: losses.balance("mixtral", q, chosen, good))
    of("mola", p, lambda q: losses.balance("mola", q, chosen, good))
    of("importance_cv2", p, lambda q: losses.importance_cv2(q, good))
    of("localised", p, lambda q: losses.localised(q, good, sequences, types, 0.25))
    of("sequence_wise", p, lambda q: losses.sequence_wise(q, chosen, good, sequences))
    of("z", logits, lambda q: losses.z_loss(q, good))
    labels = t.add("labels", [3, -1, 0, 1, 1, -1, 2]).tolist()
    of("cross_entropy", logits, lambda q: losses.cross_entropy(q, labels))
    # With respect to the logits, through the softmax, as a router receives it.
    of("mixtral_logits", logits, lambda q: losses.balance("mixtral", ad.softmax(q, dim=1), chosen, good))
    target = t.add("target", inputs("loss target", rows, experts))
    of("mse", logits, lambda q: losses.mse(q, target, good))
    load, importance, rest = losses.telemetry(p, chosen, good)
    t.add("telemetry/load", load)
    t.add("telemetry/importance", importance)
    t.add("telemetry/entropy_violation_cvload_cvimportance", rest)

    h, e = inputs("contrastive h", 4, D), inputs("contrastive e", E, D)
    labels = [1, -1, 0, 2]
    t.add("contrastive/h", h)
    t.add("contrastive/e", e)
    t.add("contrastive/labels", labels)
    h, e = h.requires_grad_(), e.requires_grad_()
    value = losses.contrastive(h, e, labels)
    value.backward()
    t.add("contrastive/value", value)
    t.add("contrastive/d.h", h.grad)
    t.add("contrastive/d.e", e.grad)
    # Of sequences: h is the first valid token, or the mean of the valid ones.
    x, labels = t.add("contrastive/x", inputs("contrastive x", rows, D)), [2, 0, 0]
    t.add("contrastive/sequence_labels", labels)
    for name in ("first", "mean"):
        x_leaf, e_leaf = x.clone().requires_grad_(), e.detach().clone().requires_grad_()
        inside = [[i for i in range(begin, end) if valid[i]] for begin, end in sequences]
        h = torch.stack([x_leaf[tokens[0]] if name == "first" else x_leaf[tokens].mean(dim=0) for tokens in inside])
        value = losses.contrastive(h, e_leaf, labels)
        value.backward()
        t.add(f"contrastive_{name}/value", value)
        t.add(f"contrastive_{name}/d.x", x_leaf.grad)
        t.add(f"contrastive_{name}/d.e", e_leaf.grad)


def shapley():
    """v(C) = ‖q‖² − ‖q − Σ_{e∈C} h_e‖² of weighted parts h_e: exact from 2^E coalitions, and the closed form."""
    t = table("shapley")
    h = inputs("shapley h", E, T, O)
    q = t.add("q", inputs("shapley q", T, O))
    for e in range(E):
        t.add(f"h{e}", h[e])

    def v(C):
        return (q * q).sum() - ((q - sum((h[e] for e in C), torch.zeros(T, O))) ** 2).sum()

    phi = []
    for e in range(E):
        others = [i for i in range(E) if i != e]
        phi.append(sum(math.factorial(n) * math.factorial(E - n - 1) / math.factorial(E) * (v([*C, e]) - v(C))
                       for n in range(E) for C in itertools.combinations(others, n)))
    phi = torch.stack(phi)
    closed = torch.stack([2 * (q * h[e]).sum() - (h[e] * h.sum(dim=0)).sum() for e in range(E)])
    assert (phi - closed).abs().max() < 1e-12 and (phi.sum() - v(range(E))).abs() < 1e-12
    t.add("phi", phi)
    by_token = torch.stack([2 * (q * h[e]).sum(dim=1) - (h[e] * h.sum(dim=0)).sum(dim=1) for e in range(E)], dim=1)
    t.add("phi_tokens", by_token)
    logits = t.add("logits", inputs("shapley logits", T, E)).clone().requires_grad_()
    valid = t.add("valid", [1, 0, 1, 1, 1]).tolist()
    loss = losses.shapley_loss(logits, by_token, [i for i in range(T) if valid[i]])
    loss.backward()
    t.add("train/value", loss)
    t.add("train/d.logits", logits.grad)


def optimisers():
    """Four steps of PyTorch's own."""
    t = table("optimisers")
    w = t.add("w", inputs("optimiser w", 1, D))
    g = t.add("g", inputs("optimiser g", 4, D))
    adamw = dict(lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.25)
    sgd = dict(lr=0.05, momentum=0.75, weight_decay=0.25)
    for name, make in {"adamw": lambda q: torch.optim.AdamW([q], **adamw),
                       "sgd": lambda q: torch.optim.SGD([q], **sgd)}.items():
        q = w.clone().requires_grad_()
        optimiser, seen = make(q), []
        for step in range(4):
            q.grad = g[step : step + 1].clone()
            optimiser.step()
            seen.append(q.detach().clone())
        t.add(name, torch.cat(seen))


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "data"
    folder.mkdir(exist_ok=True)
    for build in (lora, fused, dense_mixtures, mola, team_lora, moe_lora, more, moa, mix_lora, ada_lora, dora,
                  small_methods, loss_values, shapley, optimisers):
        build()
    sizes = {t.name: t.write(folder) for t in TABLES}
    print("\n".join(f"{size:7d} {name}" for name, size in sizes.items()), f"\n{sum(sizes.values()):7d} in all")


if __name__ == "__main__":
    main()
