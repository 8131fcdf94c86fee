"""The losses of MATH.md section 5 in float64, for one layer, from that text alone."""

import torch
from torch.nn.functional import softmax

EPS = 1e-10


def cv2(q):
    q = q.reshape(-1)
    if q.numel() < 2:
        return torch.zeros(())
    mean = q.mean()
    return ((q - mean) ** 2).sum() / (q.numel() - 1) / (mean * mean + EPS)


def counts_of(chosen, rows, E):
    return torch.tensor([float(sum(chosen[t].count(e) for t in rows)) for e in range(E)])


def balance(form, p, chosen, rows):
    """κ Σ f_i P_i; f constant, P over valid rows."""
    E, k, T = p.shape[1], len(chosen[0]), len(rows)
    assert form != "switch" or k == 1
    f = counts_of(chosen, rows, E) / (k * T if form == "mola" else T)
    return E * (f * p[rows].mean(dim=0)).sum()


def z_loss(logits, rows):
    return (torch.logsumexp(logits[rows], dim=1) ** 2).mean()


def importance_cv2(p, rows):
    return cv2(p[rows].sum(dim=0))


def localised(g, rows, sequences, types, delta):
    E, Q = g.shape[1], []
    for (begin, end), kind in zip(sequences, types):
        inside = [t for t in range(begin, end) if t in rows]
        if not inside:
            continue
        for e in range(E):
            own = (e < E // 2 and kind == 1) or (e >= E // 2 and kind == 0)
            Q.append((1 + delta if own else 1 - delta) * g[inside, e].sum())
    return cv2(torch.stack(Q))


def sequence_wise(p, chosen, rows, sequences):
    """p = s / Σ s."""
    E, k, values = p.shape[1], len(chosen[0]), []
    for begin, end in sequences:
        inside = [t for t in range(begin, end) if t in rows]
        if inside:
            f = E * counts_of(chosen, inside, E) / (k * len(inside))
            values.append((f * p[inside].mean(dim=0)).sum())
    return sum(values) / len(values)


def cross_entropy(logits, labels):
    rows = [t for t, label in enumerate(labels) if label >= 0]
    return sum(torch.logsumexp(logits[t], 0) - logits[t, labels[t]] for t in rows) / len(rows)


def mse(y, target, rows):
    return ((y[rows] - target[rows]) ** 2).mean()


def contrastive(h, e, labels, tau=0.05):
    cos = (h @ e.T) / (h.norm(dim=1)[:, None] * e.norm(dim=1)[None, :])
    return cross_entropy(cos / tau, labels)


def telemetry(p, chosen, rows):
    """load, importance, entropy, max violation, CV of load, CV of importance."""
    E = p.shape[1]
    load, importance = counts_of(chosen, rows, E), p[rows].sum(dim=0)
    entropy = -(p[rows] * p[rows].log()).sum(dim=1).mean()
    violation = load.max() / load.mean() - 1
    return load, importance, torch.stack([entropy, violation, cv2(load).sqrt(), cv2(importance).sqrt()])


def shapley_loss(logits, values, rows, tau=1.0):
    """Mean over valid tokens of KL(softmax(φ̂/τ_S) ‖ softmax(S(x))), φ̂ = φ divided by its deviation over experts."""
    total = 0
    for t in rows:
        phi = values[t] / values[t].std()  # unbiased, as the variance in CV²
        want = softmax(phi / tau, dim=0).detach()
        total = total + (want * (want.log() - torch.log_softmax(logits[t], 0))).sum()
    return total / len(rows)
