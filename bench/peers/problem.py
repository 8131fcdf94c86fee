"""The tensors of a case, which our kernels and every peer read alike, and its result in float64."""
import torch

COLD_BYTES = 700 * 2**20  # of weights gone round: more than any cache of ours holds


class Problem:
    """Of a gated product y += s · ((x̂ Aᵀ) ∘ g) Bᵀ.

    kind      gate                                            slots given
    lora      open                                            –
    dense     a weight per token and expert                   weights [T, E]
    team      the same; one A, split among the experts        weights [T, E]
    shared    the same; all experts share one A of R/E rows   weights [T, E]
    top_k     k of E experts per token                        ids [T, k], id_weights [T, k]
    served    one adapter per token                           ids [T, 1]
    segments  one expert per sequence of equal length         ids [E, 1], segments [E + 1]
    prefix    the leading ranks, per sequence                 prefix [32], segments [33]
    """

    def __init__(self, case):
        self.case = c = case
        self.dtype = getattr(torch, c.scalar)
        generator = torch.Generator().manual_seed(7)

        def draw(*shape, bound=1.0):
            return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(self.dtype)

        self.scale = 0.5
        self.copies = max(1, -(-COLD_BYTES // c.weight_bytes())) if c.cold else 1
        self.x, self.y0 = draw(c.tokens, c.d_in), draw(c.tokens, c.d_out)
        self.x[self.x == 0] = 0.5  # a 0 would hide whether dropout kept it
        self.As = draw(self.copies, c.ranks_of_a, c.d_in, bound=c.d_in**-0.5)
        self.Bs = draw(self.copies, c.ranks, c.d_out, bound=0.1)  # rank-major
        self.A, self.B = self.As[0], self.Bs[0]
        self.dy = draw(c.tokens, c.d_out)
        self.weights = self.ids = self.id_weights = self.prefix = self.segments = None
        if c.kind in ("dense", "team", "shared"):
            self.weights = torch.softmax(torch.randn(c.tokens, c.experts, generator=generator), -1)
        elif c.kind == "top_k":
            logits = torch.randn(c.tokens, c.experts, generator=generator)
            weights, ids = logits.topk(c.chosen, -1)
            self.id_weights, self.ids = torch.softmax(weights, -1).contiguous(), ids.int().contiguous()
        elif c.kind == "served":  # every adapter has a token where there are enough
            order = torch.randperm(c.experts, generator=generator)
            ids = order[torch.arange(c.tokens) % c.experts][torch.randperm(c.tokens, generator=generator)]
            self.ids = ids.int().reshape(-1, 1).contiguous()
        elif c.kind == "segments":
            self.ids = ((torch.arange(c.experts) * 3 + 1) % c.experts).int().reshape(-1, 1).contiguous()
            self.segments = torch.arange(c.experts + 1) * (c.tokens // c.experts)
        elif c.kind == "prefix":
            self.prefix = torch.randint(1, c.ranks + 1, (32,), generator=generator).int()
            self.segments = torch.arange(33) * (c.tokens // 32)
        self.rank_offsets = None
        if c.rank_of and len(set(c.rank_of)) > 1:
            self.rank_offsets = torch.tensor([0, *c.rank_of]).cumsum(0)
        self.kept = None     # [T, d_in] of the dropout that expected() applies
        self.results = None  # ours.py

    def ranks_of(self, e):
        """The ranks of expert e, as a slice."""
        if self.rank_offsets is not None:
            return slice(int(self.rank_offsets[e]), int(self.rank_offsets[e + 1]))
        return slice(e * self.case.rank, (e + 1) * self.case.rank)

    def spans(self):
        """(first token, last, expert or prefix) of every segment."""
        values = (self.prefix if self.prefix is not None else self.ids[:, 0]).tolist()
        bounds = self.segments.tolist()
        return list(zip(bounds, bounds[1:], values))

    def expert_gate(self):
        """[T, E], 0 where an expert is not chosen; None: open."""
        c = self.case
        if self.weights is not None:
            return self.weights
        if c.kind == "segments":
            per_token = self.ids.long().repeat_interleave(c.tokens // c.experts, 0)
            return torch.zeros(c.tokens, c.experts).scatter_(1, per_token, 1)
        if self.ids is not None:
            values = self.id_weights if self.id_weights is not None else torch.ones(self.ids.shape)
            return torch.zeros(c.tokens, c.experts).scatter_(1, self.ids.long(), values)
        return None

    def rank_gate(self):
        """[T, R] in the case's scalar; None: open."""
        c = self.case
        if self.prefix is not None:
            lengths = self.prefix.repeat_interleave(c.tokens // 32)
            return (torch.arange(c.ranks)[None, :] < lengths[:, None]).to(self.dtype)
        gate = self.expert_gate()
        if gate is None:
            return None
        if self.rank_offsets is not None:
            return gate.repeat_interleave(torch.tensor(c.rank_of), 1).to(self.dtype)
        return gate.repeat_interleave(c.rank, 1).to(self.dtype)

    # ---- the result in float64 ---------------------------------------------------------------------------------------

    def expected(self, train):
        """{name: (values, magnitudes)}; a magnitude is the sum of an element's absolute terms."""
        exact, size = self._evaluate(train, lambda t: t.double()), self._evaluate(train, lambda t: t.double().abs())
        return {name: (exact[name], size[name]) for name in exact}

    def _evaluate(self, train, of):
        c, s, step = self.case, self.scale, 2048
        A, B, gate = of(self.A), of(self.B), self.rank_gate()
        result = {"y": torch.empty(c.tokens, c.d_out, dtype=torch.float64)}
        if train:
            result |= {"dx": torch.empty(c.tokens, c.d_in, dtype=torch.float64), "dA": torch.zeros_like(A),
                       "dB": torch.zeros_like(B)}
            if self.weights is not None or self.id_weights is not None:
                result["dgate"] = torch.empty(c.tokens, c.chosen or c.experts, dtype=torch.float64)
        for t in range(0, c.tokens, step):
            rows = slice(t, min(t + step, c.tokens))
            kept = 1.0 if self.kept is None else of(self.kept[rows]) / (1 - round(65536 * c.dropout) / 65536)
            x = of(self.x[rows]) * kept
            u = x @ A.T
            if c.shared:
                u = u.repeat(1, c.experts)
            g = torch.ones_like(u) if gate is None else of(gate[rows])
            result["y"][rows] = of(self.y0[rows]) + s * (u * g) @ B
            if not train:
                continue
            dy = of(self.dy[rows])
            slope = s * dy @ B.T
            result["dB"] += s * (u * g).T @ dy
            du = slope * g
            if c.shared:
                du = du.view(len(du), c.experts, c.rank).sum(1)
            result["dA"] += du.T @ x
            result["dx"][rows] = (du @ A) * kept
            if "dgate" in result:
                per_expert = (slope * u).view(len(u), c.experts, c.rank).sum(2)
                result["dgate"][rows] = per_expert if self.ids is None else per_expert.gather(1, self.ids[rows].long())
        return result

    def tolerance(self, name):
        """Of an error against its magnitude: every addition may round, and every 16-bit value in between."""
        c = self.case
        additions = {"y": c.d_in + c.ranks, "dx": c.d_out + c.ranks, "dA": c.d_out + c.tokens, "dB": c.d_in + c.tokens,
                     "dgate": c.d_in + c.d_out + c.rank}[name] + 16
        return additions * 2.0**-24 + (0 if self.dtype == torch.float32 else (4 + 4 * c.experts) * 2.0**-9)


def check(who, got, expected, tolerance):
    """Raises where a value is not finite or too far off."""
    for name, (want, magnitude) in expected.items():
        if not want.abs().max() > 0:
            raise AssertionError(f"{name} is 0 everywhere: nothing is checked")
        off = (got[name].double() - want).abs()
        if not bool((off <= tolerance(name) * magnitude + 1e-30).all()):
            worst = (off / (magnitude + 1e-30)).max().item()
            raise AssertionError(f"{who}: {name} is off by {worst:.1e} of its terms, more than {tolerance(name):.1e}")


def draws(seed=7):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, bound=1.0: torch.empty(shape).uniform_(-bound, bound, generator=generator)


class BlockProblem:
    """A MixLoRA block: d_in → d_out (here: hidden) → d_in, with its router."""

    def __init__(self, case):
        self.case, self.scale, draw = case, 0.5, draws()
        c, R = case, case.ranks
        d, wide = c.d_in, c.d_out
        self.x, self.dy = draw(c.tokens, d), draw(c.tokens, d)
        self.W1, self.W3, self.W2 = draw(wide, d, bound=d**-0.5), draw(wide, d, bound=d**-0.5), draw(d, wide, bound=wide**-0.5)
        self.parameters = {
            "gate_proj.lora_A.weight": draw(R, d, bound=d**-0.5), "up_proj.lora_A.weight": draw(R, d, bound=d**-0.5),
            "gate_proj.lora_B.weight": draw(R, wide, bound=0.1), "up_proj.lora_B.weight": draw(R, wide, bound=0.1),
            "down_proj.lora_A.weight": draw(R, wide, bound=wide**-0.5), "down_proj.lora_B.weight": draw(R, d, bound=0.1),
            "moe_gate.weight": draw(c.experts, d, bound=(3 / d) ** 0.5)}
        best = (self.x.double() @ self.parameters["moe_gate.weight"].double().T).sort(-1, descending=True).values
        if not (best[:, c.chosen - 1] - best[:, c.chosen]).min() > 1e-5:
            raise AssertionError("two experts are chosen by rounding: take another seed")

    def ranks_of(self, e):
        return slice(e * self.case.rank, (e + 1) * self.case.rank)

    def expected(self, train):
        """In float64, token by token's experts; the magnitude of an element is the root mean square of its tensor."""
        c, s = self.case, self.scale
        P = {name: value.double().requires_grad_(train) for name, value in self.parameters.items()}
        x = self.x.double().requires_grad_(train)
        W1, W3, W2 = self.W1.double(), self.W3.double(), self.W2.double()
        logits, ids = (x @ P["moe_gate.weight"].T).topk(c.chosen, -1)
        g = torch.zeros(c.tokens, c.experts, dtype=torch.float64).scatter(1, ids, torch.softmax(logits, -1))
        u, v, y = x @ W1.T, x @ W3.T, 0.0
        for e in range(c.experts):
            r = self.ranks_of(e)
            rows = (g[:, e] != 0).nonzero()[:, 0]
            t1 = u[rows] + s * (x[rows] @ P["gate_proj.lora_A.weight"][r].T) @ P["gate_proj.lora_B.weight"][r]
            t3 = v[rows] + s * (x[rows] @ P["up_proj.lora_A.weight"][r].T) @ P["up_proj.lora_B.weight"][r]
            h = t1 * torch.sigmoid(t1) * t3
            out = h @ W2.T + s * (h @ P["down_proj.lora_A.weight"][r].T) @ P["down_proj.lora_B.weight"][r]
            y = y + torch.zeros_like(x).index_add(0, rows, g[rows, e, None] * out)
        result = {"y": y.detach()}
        if train:
            y.backward(self.dy.double())
            result |= {"dx": x.grad, **{name: value.grad for name, value in P.items()}}
        return {name: (value, value.square().mean().sqrt().expand_as(value)) for name, value in result.items()}

    def tolerance(self, name):
        return (self.case.d_in + 2 * self.case.d_out + self.case.tokens + self.case.ranks) * 2.0**-24


class NormProblem:
    """DoRA: ‖w_i + s (BA)_i‖ of the rows of W [d_out, d_in]."""

    def __init__(self, case):
        self.case, self.scale, draw = case, 2.0, draws()
        self.W = draw(case.d_out, case.d_in, bound=case.d_in**-0.5)
        self.A, self.B = draw(case.ranks, case.d_in, bound=case.d_in**-0.5), draw(case.ranks, case.d_out, bound=0.1)

    def expected(self, train):
        W, A, B, s = self.W.double(), self.A.double(), self.B.double().T, self.scale
        norms = (W + s * B @ A).norm(dim=1)
        terms = (W * W).sum(1) + 2 * s * ((W.abs() @ A.abs().T) * B.abs()).sum(1) + s * s * (B.abs() @ A.abs()).square().sum(1)
        return {"norms": (norms, terms / norms)}

    def tolerance(self, name):
        return (self.case.d_in + 2 * self.case.ranks) * 2.0**-24


def problem_of(case):
    return {"block": BlockProblem, "norm": NormProblem}.get(case.kind, Problem)(case)
