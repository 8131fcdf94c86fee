"""What others write for the same product, in PyTorch: each as fast as its kind is, on the tensors that ours reads.

addmm             y.addmm_((x @ A_all.T) * g, B_all.T, alpha=s): all experts stacked, in place, gradients by hand and in
                  place too; B stored by ranks or by outputs, whichever is faster. The strongest. Experts that are off
                  are multiplied by 0.
torch.compile     the same expression, compiled
addmm per expert  the same, expert by expert
loop              y += g_e (x A_eᵀ) B_eᵀ s, expert by expert; over segments: on slices, in place, gradients by hand
gather loop       the same on the tokens that chose an expert, index_add_ back (as HF Mixtral does)
sorted            tokens sorted by expert, one grouped product per factor (slices or grouped_mm, the faster), index_add_
per-token gather  A[ids], B[ids] and batched products (Punica's BGMV, vLLM on CPUs)
class             the public package's own class: LoRAMoE and MoLA (MoE-PEFT), HydraLoRA; TeamLoRA as its paper describes
                  it, for its class was never released
MOELoRA           MOELoRA-peft's class
X-LoRA            PEFT's XLoraLinearLayer itself: x is scaled for every adapter
PEFT              PEFT's lora.Linear itself; `PEFT mixed batch`: with adapter_names

Where gradients are not by hand they are autograd's, as in those packages. Their base layer is given: it returns y.
"""
import functools

import torch
import torch.nn.functional as F

from ours import reset, result_tensors

FORMS = {}


def form(name, *kinds):
    def register(make):
        for kind in kinds:
            FORMS.setdefault(kind, {}).setdefault(name, []).append(make)
        return make

    return register


def copies_of(p, by_rank=True):
    """(A, B) of every copy of the weights; B as [R, d_out], in memory by ranks or by outputs."""
    Bs = p.Bs if by_rank else p.Bs.transpose(1, 2).contiguous().transpose(1, 2)
    return [(p.As[i], Bs[i]) for i in range(p.copies)]


class ByHand:
    """A step that adds to its own result tensors; `step(A, B)` is given the next copy of the weights."""

    def __init__(self, p, train, by_rank=True):
        self.p, self.train, self.s = p, train, p.scale
        self.results = result_tensors(p)
        if not by_rank:
            self.results["dB"] = torch.zeros(p.case.d_out, p.case.ranks, dtype=p.dtype).T
        self.y, self.dx, self.dA, self.dB = (self.results[n] for n in ("y", "dx", "dA", "dB"))
        self.weights, self.next = copies_of(p, by_rank), 0
        self.gate, self.kept = p.rank_gate(), None

    def __call__(self):
        A, B = self.weights[self.next]
        self.next = self.next + 1 if self.next + 1 < len(self.weights) else 0
        self.step(A, B)

    def fresh(self):
        reset(self.p, self.results)
        self.next = 0
        self()
        self.next = 0
        return self.results


class Addmm(ByHand):
    def step(self, A, B):
        p, c, x, g = self.p, self.p.case, self.p.x, self.gate
        if c.dropout > 0:
            x, self.kept = torch.native_dropout(x, c.dropout, True)
        u = x @ A.T
        if c.shared:
            z = (u[:, None, :] * p.weights[:, :, None]).view(len(u), c.ranks)
        else:
            z = u if g is None else u * g
        self.y.addmm_(z, B, alpha=self.s)
        if not self.train:
            return
        dz = (p.dy @ B.T).mul_(self.s)
        if self.dB.is_contiguous():
            self.dB.addmm_(z.T, p.dy, alpha=self.s)
        else:
            self.dB.T.addmm_(p.dy.T, z, alpha=self.s)
        if c.shared:
            per_expert = dz.view(len(dz), c.experts, c.rank)
            self.results["dgate"] = (per_expert * u[:, None, :]).sum(-1)
            du = (per_expert * p.weights[:, :, None]).sum(1)
        else:
            if "dgate" in self.results:
                self.results["dgate"] = (dz * u).view(len(dz), c.experts, c.rank).sum(-1)
            du = dz if g is None else dz.mul_(g)
        self.dA.addmm_(du.T, x)
        if c.dropout > 0:
            self.dx.addcmul_(du @ A, self.kept, value=1 / (1 - c.dropout))
        else:
            self.dx.addmm_(du, A)

    def fresh(self):
        results = dict(super().fresh())
        if self.train and self.p.ids is not None and self.p.id_weights is not None:
            results["dgate"] = results["dgate"].gather(1, self.p.ids.long())
        return results


ALL_STACKED = ("lora", "dense", "team", "shared", "top_k", "served", "segments", "prefix")
form("addmm", *ALL_STACKED)(Addmm)
form("addmm", *ALL_STACKED)(functools.partial(Addmm, by_rank=False))


@form("torch.compile", "lora", "dense", "shared", "top_k")
class Compiled(Addmm):
    def __init__(self, p, train):
        super().__init__(p, train)
        torch._dynamo.reset()
        self.compiled = torch.compile(self.forward_and_back if train else self.forward, dynamic=False)

    def forward(self, x, y, A, B, g, weights):
        c = self.p.case
        u = x @ A.T
        if c.shared:
            z = (u[:, None, :] * weights[:, :, None]).view(len(u), c.ranks)
        else:
            z = u if g is None else u * g
        y.addmm_(z, B, alpha=self.s)
        return u, z

    def forward_and_back(self, x, y, A, B, g, weights, dy, dx, dA, dB):
        c = self.p.case
        u, z = self.forward(x, y, A, B, g, weights)
        dz = (dy @ B.T) * self.s
        dB.addmm_(z.T, dy, alpha=self.s)
        per_expert, dgate = dz.view(len(dz), c.experts, c.rank), None
        if g is not None or c.shared:
            dgate = (per_expert * (u[:, None, :] if c.shared else u.view(per_expert.shape))).sum(-1)
        du = (per_expert * weights[:, :, None]).sum(1) if c.shared else dz if g is None else dz * g
        dA.addmm_(du.T, x)
        dx.addmm_(du, A)
        return dgate

    def step(self, A, B):
        tensors = (self.p.x, self.y, A, B, self.gate, self.p.weights)
        if not self.train:
            self.compiled(*tensors)
            return
        dgate = self.compiled(*tensors, self.p.dy, self.dx, self.dA, self.dB)
        if dgate is not None:
            self.results["dgate"] = dgate


@form("loop", "segments", "prefix")
class SegmentLoop(ByHand):
    """Slices of tokens, of A and of B: no copy anywhere."""

    def __init__(self, p, train):
        super().__init__(p, train)
        self.spans = [(slice(b, e), slice(0, v) if p.prefix is not None else p.ranks_of(v)) for b, e, v in p.spans()]

    def step(self, A, B):
        p, s = self.p, self.s
        for rows, ranks in self.spans:
            x, a, b = p.x[rows], A[ranks], B[ranks]
            u = x @ a.T
            self.y[rows].addmm_(u, b, alpha=s)
            if self.train:
                dy = p.dy[rows]
                du = (dy @ b.T).mul_(s)
                self.dB[ranks].addmm_(u.T, dy, alpha=s)
                self.dA[ranks].addmm_(du.T, x)
                self.dx[rows].addmm_(du, a)


class Autograd:
    """Experts as a package's modules hold them: A_e [r, d_in], B_e [d_out, r], each on its own. `delta(y)` returns the output."""

    def __init__(self, p, train):
        self.p, self.train, self.s, c = p, train, p.scale, p.case
        leaf = lambda t: t.detach().clone().requires_grad_(train)
        self.x = p.x.detach().requires_grad_(train)
        self.A = [leaf(p.A)] if c.shared or c.kind == "team" else [leaf(p.A[p.ranks_of(e)]) for e in range(c.experts)]
        self.B = [leaf(p.B[p.ranks_of(e)].T.contiguous()) for e in range(c.experts)]
        gate = p.weights if p.weights is not None else p.id_weights
        self.g = None if gate is None else gate.detach().requires_grad_(train)
        self.ids = None if p.ids is None else p.ids.long()
        self.y0 = result_tensors(p)["y"]
        self.y = self.kept = None

    def __call__(self):
        with torch.set_grad_enabled(self.train):
            self.y = self.delta(self.y0.detach())
        if self.train:
            self.y.backward(self.p.dy.view(self.y.shape))

    def fresh(self):
        self.y0.copy_(self.p.y0)
        for leaf in self.leaves():
            leaf.grad = None
        self()
        results = {"y": self.y.detach().view(self.p.y0.shape)}
        if self.train:
            results |= {"dx": self.x.grad, "dA": self.of_A(), "dB": self.of_B()}
            if self.g is not None:
                results["dgate"] = self.g.grad
        return results

    def leaves(self):
        return [leaf for leaf in (self.x, *self.A, *self.B, self.g) if leaf is not None]

    def of_A(self):
        return torch.cat([grad(a) for a in self.A])

    def of_B(self):
        return torch.cat([grad(b).T for b in self.B])


def grad(leaf):
    """0 where nobody chose an expert."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@form("loop", "dense", "team", "shared")
class Loop(Autograd):
    def delta(self, y):
        u = F.linear(self.x, self.A[0]) if self.p.case.shared else None
        for e, b in enumerate(self.B):
            h = F.linear(self.x, self.A[e]) if u is None else u
            y += self.g[:, e : e + 1].to(y.dtype) * F.linear(h, b) * self.s
        return y


@form("addmm per expert", "dense")
class AddmmPerExpert(Autograd):
    def delta(self, y):
        for e, (a, b) in enumerate(zip(self.A, self.B)):
            h = F.linear(self.x, a) * self.g[:, e : e + 1].to(y.dtype)
            y = y.addmm_(h, b.T, alpha=self.s)
        return y


@form("class", "dense")
class LoraMoeClass(Autograd):
    """One sequence; a dropout that is off; every step a tensor of its own."""

    def delta(self, y):
        x, y, gate = self.x[None], y[None], self.g[None]
        for e, (a, b) in enumerate(zip(self.A, self.B)):
            h = F.linear(F.linear(F.dropout(x, 0.0), a), b) * self.s
            y = y + torch.unsqueeze(gate[:, :, e], -1) * h
        return y


@form("MOELoRA", "dense")
class MoeLoraClass(Autograd):
    """MOELoRA-peft's: weights are looked up by task there; the expression is the same."""

    def delta(self, y):
        x, y = self.x[None], y[None]
        for e, (a, b) in enumerate(zip(self.A, self.B)):
            y += F.linear(F.linear(F.dropout(x, 0.0), a), b) * self.s * self.g[..., e].unsqueeze(-1).unsqueeze(0)
        return y


@form("class", "shared")
class HydraClass(Autograd):
    """A is multiplied for every expert again."""

    def delta(self, y):
        x, y, gate = self.x[None], y[None], self.g[None]
        for e, b in enumerate(self.B):
            y = y + torch.unsqueeze(gate[:, :, e], -1) * F.linear(F.linear(F.dropout(x, 0.0), self.A[0]), b) * self.s
        return y


@form("class", "team")
class TeamForm(Autograd):
    def delta(self, y):
        z = F.linear(self.x, self.A[0])
        for e, (h, b) in enumerate(zip(z.split(self.p.case.rank, -1), self.B)):
            y = y + self.g[:, e : e + 1] * F.linear(h, b) * self.s
        return y


@form("gather loop", "top_k", "served")
class GatherLoop(Autograd):
    def delta(self, y):
        experts = range(len(self.B)) if len(self.B) <= 64 else self.ids.unique().tolist()
        for e in experts:
            token, slot = torch.where(self.ids == e)
            h = F.linear(F.linear(self.x[token], self.A[e]), self.B[e]) * self.s
            y.index_add_(0, token, h if self.g is None else h * self.g[token, slot, None])
        return y


@form("class", "top_k")
class MolaClass(Autograd):
    def delta(self, y):
        mask = F.one_hot(self.ids, num_classes=len(self.B)).permute(2, 1, 0)
        total = torch.zeros_like(y)
        for e, (a, b) in enumerate(zip(self.A, self.B)):
            slot, token = torch.where(mask[e])
            x = self.x[None, token].reshape(-1, self.x.shape[1])
            h = F.linear(F.linear(F.dropout(x, 0.0), a), b) * self.s
            total.index_add_(0, token, h * self.g[token, slot, None])
        return y + total


class Sorted(Autograd):
    def __init__(self, p, train):
        super().__init__(p, train)
        self.A_all = p.A.detach().clone().requires_grad_(train)
        self.B_all = p.B.detach().clone().requires_grad_(train)
        self.A, self.B = [self.A_all], [self.B_all]

    def delta(self, y):
        c, k = self.p.case, self.ids.shape[1]
        order = self.ids.flatten().argsort(stable=True)
        token = order // k
        ends = torch.bincount(self.ids.flatten(), minlength=c.experts).cumsum(0)
        x = self.x.index_select(0, token)
        h = self.first(x, ends)
        if self.g is not None:
            h = h * self.g.flatten()[order, None]
        return y.index_add_(0, token, self.second(h, ends), alpha=self.s)

    def of_B(self):
        return self.B_all.grad


@form("sorted", "top_k", "served")
class SortedSlices(Sorted):
    def first(self, x, ends):
        return _pad([x[b:e] @ self.A_all[r].T for b, e, r in _runs(self.p, ends)])

    def second(self, h, ends):
        return torch.cat([h[b:e, : r.stop - r.start] @ self.B_all[r] for b, e, r in _runs(self.p, ends)])


def _runs(p, ends):
    """(first row, last, ranks) of every expert that has rows."""
    begin = 0
    for e, end in enumerate(ends.tolist()):
        if end > begin:
            yield begin, end, p.ranks_of(e)
        begin = end


def _pad(parts):
    widest = max(part.shape[1] for part in parts)
    return torch.cat([part if part.shape[1] == widest else F.pad(part, (0, widest - part.shape[1])) for part in parts])


@form("sorted", "top_k", "served")
class GroupedMm(Sorted):
    equal_ranks = True

    def first(self, x, ends):
        c = self.p.case
        return F.grouped_mm(x, self.A_all.view(c.experts, c.rank, c.d_in).transpose(1, 2), offs=ends.int())

    def second(self, h, ends):
        c = self.p.case
        return F.grouped_mm(h, self.B_all.view(c.experts, c.rank, c.d_out), offs=ends.int())


@form("per-token gather", "top_k", "served")
class PerTokenGather(Autograd):
    def __init__(self, p, train):
        super().__init__(p, train)
        c = p.case
        widest = max(c.rank_of) if c.rank_of else c.rank
        pad = lambda w: F.pad(w, (0, 0, 0, widest - w.shape[0]))
        self.A_all = torch.stack([pad(p.A[p.ranks_of(e)]) for e in range(c.experts)]).requires_grad_(train)
        self.B_all = torch.stack([pad(p.B[p.ranks_of(e)]) for e in range(c.experts)]).requires_grad_(train)
        self.A, self.B = [self.A_all], [self.B_all]

    def delta(self, y):
        T, k = self.ids.shape
        a = self.A_all[self.ids].flatten(1, 2)  # [T, k r, d_in]
        b = self.B_all[self.ids].flatten(1, 2)
        h = torch.bmm(a, self.x[:, :, None]).view(T, k, -1)
        if self.g is not None:
            h = h * self.g[:, :, None]
        return torch.baddbmm(y[:, None], h.view(T, 1, -1), b, alpha=self.s)[:, 0]

    def of_A(self):
        return self.A_all.grad.flatten(0, 1)

    def of_B(self):
        return self.B_all.grad.flatten(0, 1)


# ---- PEFT's own classes ----------------------------------------------------------------------------------------------


def peft_linear(p, train, ranks):
    """PEFT's layer with an adapter per expert over a base layer that returns the given y."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    class Given(torch.nn.Linear):
        def forward(self, x):
            return self.y

    c, s = p.case, p.scale
    base = Given(c.d_in, c.d_out, bias=False, device="meta")
    layer = None
    for e, r in enumerate(ranks):
        config = LoraConfig(r=r, lora_alpha=1, lora_dropout=c.dropout, init_lora_weights=False)
        if layer is None:
            layer = Linear(base, "0", config, r=r, lora_alpha=s * r)
        else:
            layer.update_layer(str(e), r, lora_alpha=s * r, config=config)
    for e in range(len(ranks)):
        for module, weight in ((layer.lora_A, p.A[p.ranks_of(e)]), (layer.lora_B, p.B[p.ranks_of(e)].T)):
            module[str(e)] = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            module[str(e)].weight = torch.nn.Parameter(weight.detach().contiguous().clone(), requires_grad=train)
    layer.train(train or c.dropout > 0)
    return layer


class Peft(Autograd):
    def __init__(self, p, train):
        super().__init__(p, train)
        c = p.case
        self.layer = peft_linear(p, train, c.rank_of or (c.rank,) * c.experts)
        self.base = self.layer.get_base_layer()
        self.A = [self.layer.lora_A[str(e)].weight for e in range(c.experts)]
        self.B = [self.layer.lora_B[str(e)].weight for e in range(c.experts)]
        self.layer.set_adapter([str(e) for e in range(c.experts)])
        for leaf in (*self.A, *self.B):
            leaf.requires_grad_(train)


@form("PEFT", "lora")
class PeftLayer(Peft):
    def __init__(self, p, train):
        super().__init__(p, train)
        if p.copies > 1:  # weights that no cache holds
            Bs = p.Bs.transpose(1, 2).contiguous()
            self.ring = [(torch.nn.Parameter(p.As[i], train), torch.nn.Parameter(Bs[i], train)) for i in range(p.copies)]
            self.next = 0
        self.drawn = None
        if p.case.dropout > 0:
            self.layer.lora_dropout["0"].register_forward_hook(self.remember)

    def remember(self, module, arguments, output):
        self.drawn = output if self.drawn is True else None

    def delta(self, y):
        if self.p.copies > 1:
            self.layer.lora_A["0"].weight, self.layer.lora_B["0"].weight = self.ring[self.next]
            self.next = (self.next + 1) % len(self.ring)
        self.base.y = y
        return self.layer(self.x)

    def fresh(self):
        self.next, self.drawn = 0, True
        results = super().fresh()
        if self.drawn is not None and self.drawn is not True:
            self.kept = self.drawn.detach() != 0
        self.drawn, self.next = None, 0
        return results


@form("PEFT mixed batch", "served", "segments")
class PeftMixedBatch(Peft):
    """A sample is a token, or a sequence."""
    trains = False  # in PEFT it is for inference

    def __init__(self, p, train):
        super().__init__(p, train)
        self.names = [str(e) for e in p.ids[:, 0].tolist()]
        self.shape = (len(self.names), -1) if p.segments is None else (len(self.names), len(p.x) // len(self.names), -1)
        self.layer.eval()

    def delta(self, y):
        self.base.y = y.view(*self.shape[:-1], y.shape[1])
        return self.layer(self.x.view(*self.shape[:-1], self.x.shape[1]), adapter_names=self.names)


@form("X-LoRA", "dense", "top_k")
class XLora(Peft):
    def __init__(self, p, train):
        super().__init__(p, train)
        from types import SimpleNamespace

        from peft.tuners.xlora.config import XLoraConfig
        from peft.tuners.xlora.layer import XLoraLinearLayer

        config = XLoraConfig(hidden_size=p.case.d_in, adapters={str(e): "" for e in range(p.case.experts)})
        self.xlora = XLoraLinearLayer(SimpleNamespace(disabled=False), self.layer, self.layer.forward, 0, config)
        self.dense = p.expert_gate().detach()

    def delta(self, y):
        self.base.y = y[None]
        gate = self.g
        if self.ids is not None:
            gate = torch.zeros_like(self.dense).scatter(1, self.ids, self.g)
        return self.xlora.forward(self.x[None], scalings=gate[None, :, None, :])


# ---- the MixLoRA block and DoRA's norm -------------------------------------------------------------------------------


class BlockForm:
    """The router, then per expert its tokens' rows of W1 x and W3 x, and a product with W2 of their own."""
    kept = None

    def __init__(self, p, train):
        self.p, self.train, c = p, train, p.case
        leaf = lambda t: t.detach().clone().requires_grad_(train)
        self.parameters = {name: leaf(value) for name, value in p.parameters.items()}
        split = lambda name: self.parameters[name]
        self.A1, self.A3 = split("gate_proj.lora_A.weight"), split("up_proj.lora_A.weight")
        self.B1, self.B3 = split("gate_proj.lora_B.weight"), split("up_proj.lora_B.weight")
        self.A2, self.B2, self.router = split("down_proj.lora_A.weight"), split("down_proj.lora_B.weight"), split("moe_gate.weight")
        self.x = p.x.detach().requires_grad_(train)
        self.y = None

    def route(self):
        weights, ids = (self.x @ self.router.T).topk(self.p.case.chosen, -1)
        return torch.softmax(weights, -1), ids

    def expert(self, e, x, u, v):
        p, s, ranks = self.p, self.p.scale, self.p.ranks_of(e)
        t1 = torch.addmm(u, x @ self.A1[ranks].T, self.B1[ranks], alpha=s)
        t3 = torch.addmm(v, x @ self.A3[ranks].T, self.B3[ranks], alpha=s)
        h = F.silu(t1) * t3
        return torch.addmm(h @ p.W2.T, h @ self.A2[ranks].T, self.B2[ranks], alpha=s)

    def __call__(self):
        with torch.set_grad_enabled(self.train):
            self.y = self.block()
        if self.train:
            self.y.backward(self.p.dy)

    def fresh(self):
        for leaf in (self.x, *self.parameters.values()):
            leaf.grad = None
        self()
        results = {"y": self.y.detach()}
        if self.train:
            results |= {"dx": self.x.grad, **{name: leaf.grad for name, leaf in self.parameters.items()}}
        return results


@form("gather loop", "block")
class BlockGatherLoop(BlockForm):
    def block(self):
        p = self.p
        weights, ids = self.route()
        u, v = self.x @ p.W1.T, self.x @ p.W3.T
        y = torch.zeros(p.dy.shape)
        for e in range(p.case.experts):
            token, slot = torch.where(ids == e)
            out = self.expert(e, self.x[token], u[token], v[token])
            y.index_add_(0, token, out * weights[token, slot, None])
        return y


@form("sorted", "block")
class BlockSorted(BlockForm):
    def block(self):
        p, k = self.p, self.p.case.chosen
        weights, ids = self.route()
        order = ids.flatten().argsort(stable=True)
        token = order // k
        ends = torch.bincount(ids.flatten(), minlength=p.case.experts).cumsum(0)
        x, u, v = self.x[token], (self.x @ p.W1.T)[token], (self.x @ p.W3.T)[token]
        out = torch.cat([self.expert(r.start // p.case.rank, x[b:e], u[b:e], v[b:e]) for b, e, r in _runs(p, ends)])
        return torch.zeros(p.dy.shape).index_add_(0, token, out * weights.flatten()[order, None])


class NormForm:
    kept = None

    def __init__(self, p, train):
        self.p, self.squares, self.norms = p, (p.W * p.W).sum(1), None

    def fresh(self):
        self()
        return {"norms": self.norms}


@form("PEFT", "norm")
class PeftNorm(NormForm):
    """PEFT's: the change is made, added and its rows' norms taken."""

    def __init__(self, p, train):
        super().__init__(p, train)
        self.B = p.B.T.contiguous()

    def __call__(self):
        self.norms = torch.linalg.norm(self.p.W + self.p.scale * (self.B @ self.p.A), dim=1)


@form("low-rank form", "norm")
class LowRankNorm(NormForm):
    """‖w‖² cached; the rest in rank space."""

    def __call__(self):
        p, s = self.p, self.p.scale
        mixed, gram, B = p.W @ p.A.T, p.A @ p.A.T, p.B.T
        self.norms = (self.squares + 2 * s * (mixed * B).sum(1) + s * s * ((B @ gram) * B).sum(1)).sqrt()
