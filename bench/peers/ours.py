"""loramix in this process: kernels.cpp by ctypes, on PyTorch's tensors, in PyTorch's libgomp."""
import ctypes
import glob
import os

import torch

I, P, D = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
FIELDS = [(name, I) for name in "threads is_bfloat16 tokens d_in d_out ranks ranks_of_a experts chosen".split()]
FIELDS += [("scale", D), ("dropout", D), ("step", I)]
FIELDS += [(name, P) for name in "x A B y weights ids id_weights prefix rank_offsets segments".split()]
FIELDS += [("groups", I)] + [(name, P) for name in "u dy dx dA dB dgate du mask work".split()] + [("work_bytes", I)]


class Call(ctypes.Structure):
    """LoramixCall of kernels.cpp."""
    _fields_ = FIELDS


class Library:
    def __init__(self, path):
        found = [p for folder in ("lib", "../torch.libs")
                 for p in glob.glob(os.path.join(os.path.dirname(torch.__file__), folder, "libgomp*"))]
        if len(found) != 1:
            raise RuntimeError(f"PyTorch should bring one libgomp, and brings {found}")
        ctypes.CDLL(found[0], ctypes.RTLD_GLOBAL)
        self.c = c = ctypes.CDLL(os.path.abspath(path))
        c.loramix_error.restype = ctypes.c_char_p
        c.loramix_work_bytes.restype = c.loramix_norms.restype = I
        c.loramix_norms.argtypes = [I] * 4 + [P] * 4 + [D, P, P, I]
        c.loramix_block_new.restype = P
        c.loramix_block_new.argtypes = [I] * 8 + [D]
        c.loramix_block_values.restype = P
        c.loramix_block_values.argtypes = [P, ctypes.c_char_p, ctypes.c_int]
        c.loramix_block_delete.argtypes, c.loramix_block_delete.restype = [P], None
        for stage, pointers in (("mix", 3), ("finish", 1), ("finish_backward", 1), ("mix_backward", 5), ("route_backward", 2)):
            getattr(c, "loramix_block_" + stage).argtypes = [P] * (1 + pointers)
        c.loramix_block_route.argtypes = [P, P, I]

    def ok(self, status):
        if status != 0:
            raise RuntimeError(self.c.loramix_error().decode())


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def result_tensors(p):
    """What steps add to: one set for all who are compared."""
    if p.results is None:
        c = p.case
        p.results = {"y": p.y0.clone(), "dx": torch.zeros_like(p.x), "dA": torch.zeros_like(p.A), "dB": torch.zeros_like(p.B)}
        if p.weights is not None or p.id_weights is not None:
            p.results["dgate"] = torch.zeros(c.tokens, c.chosen or c.experts)
    return dict(p.results)


def reset(p, results):
    for name, tensor in results.items():
        tensor.copy_(p.y0) if name == "y" else tensor.zero_()


class Ours:
    """Forward, or forward and backward, of a gated product."""

    def __init__(self, library, p, threads, train):
        c, self.p, self.library, self.kept = p.case, p, library, None
        self.results = result_tensors(p)
        if p.dtype == torch.bfloat16:  # gradients of 16-bit weights are float
            self.results |= {name: self.results[name].float() for name in ("dA", "dB")}
        self.u, self.du = torch.empty(c.tokens, c.ranks_of_a), torch.empty(c.tokens, c.ranks_of_a)
        r = self.results
        groups = c.tokens if p.segments is None else len(p.segments) - 1
        common = dict(threads=threads, is_bfloat16=int(p.dtype == torch.bfloat16), tokens=c.tokens, d_in=c.d_in,
                      d_out=c.d_out, ranks=c.ranks, ranks_of_a=c.ranks_of_a, experts=c.experts, chosen=c.chosen,
                      scale=p.scale, dropout=c.dropout, x=address(p.x), y=address(r["y"]), weights=address(p.weights),
                      ids=address(p.ids), id_weights=address(p.id_weights), prefix=address(p.prefix),
                      rank_offsets=address(p.rank_offsets), segments=address(p.segments), groups=groups,
                      u=address(self.u), du=address(self.du))
        if train:
            common |= dict(dy=address(p.dy), dx=address(r["dx"]), dA=address(r["dA"]), dB=address(r["dB"]),
                           dgate=address(r.get("dgate")))
            if c.dropout > 0:
                self.mask = torch.empty(c.tokens, -(-c.d_in // 512) * 64, dtype=torch.uint8)
                common["mask"] = address(self.mask)
        self.calls = [Call(A=address(p.As[i]), B=address(p.Bs[i]), **common) for i in range(p.copies)]
        size = library.c.loramix_work_bytes(ctypes.byref(self.calls[0]))
        if size < 0:
            library.ok(1)
        self.work = torch.empty(size, dtype=torch.uint8)
        for call in self.calls:
            call.work, call.work_bytes = address(self.work), size
        self.ring = [ctypes.byref(call) for call in self.calls]
        self.next, self.train = 0, train

    def __call__(self):
        call, self.next = self.ring[self.next], self.next + 1
        if self.next == len(self.ring):
            self.next = 0
        status = self.library.c.loramix_forward(call)
        if self.train and status == 0:
            status = self.library.c.loramix_backward(call)
        if status != 0:
            self.library.ok(status)

    def fresh(self):
        """The results of one step from a fresh start, with the first of the weights."""
        reset(self.p, self.results)
        self.next = 0
        self()
        self.next = 0
        if self.p.case.dropout > 0:
            self.kept = torch.empty(self.p.x.shape, dtype=torch.uint8)
            self.library.ok(self.library.c.loramix_kept(self.ring[0], ctypes.c_void_p(address(self.kept))))
        return self.results


class OurNorms:
    kept = None

    def __init__(self, library, p, threads):
        self.library, self.norms = library, torch.empty(p.case.d_out)
        self.squares = (p.W * p.W).sum(1)
        shape = (threads, p.case.d_out, p.case.d_in, p.case.ranks)
        tensors = (address(p.W), address(self.squares), address(p.A), address(p.B), p.scale, address(self.norms))
        self.work = torch.empty(library.c.loramix_norms(*shape, *tensors, None, 0), dtype=torch.uint8)
        self.arguments = (*shape, *tensors, address(self.work), self.work.numel())

    def __call__(self):
        if self.library.c.loramix_norms(*self.arguments) < 0:
            self.library.ok(1)

    def fresh(self):
        self.norms.zero_()
        self()
        return {"norms": self.norms}


class OurBlock:
    """A MixLoRA block: our three stages between PyTorch's products with W1, W3 and one W2."""
    kept = None

    def __init__(self, library, p, threads, train):
        c, self.p, self.library, self.train = p.case, p, library, train
        self.c = library.c
        self.handle = self.c.loramix_block_new(threads, c.tokens, c.d_in, c.d_out, c.d_in, c.experts, c.rank, c.chosen,
                                               p.scale * c.rank)
        if not self.handle:
            library.ok(1)
        self.gradients = {}
        for name, value in p.parameters.items():
            self.view(name, value.shape, 0).copy_(value)
            self.gradients[name] = self.view(name, value.shape, 1)
        wide = lambda: torch.empty(c.tokens, c.d_out)
        self.u, self.v, self.h, self.dh, self.du, self.dv = (wide() for _ in range(6))
        self.y, self.dx = torch.empty(c.tokens, c.d_in), torch.zeros(c.tokens, c.d_in)

    def __del__(self):
        self.c.loramix_block_delete(self.handle)

    def view(self, name, shape, of_gradient):
        start = self.c.loramix_block_values(self.handle, name.encode(), of_gradient)
        values = (ctypes.c_float * (shape[0] * shape[1])).from_address(start)
        return torch.frombuffer(values, dtype=torch.float32).view(shape)

    def stage(self, name, *tensors):
        self.library.ok(getattr(self.c, "loramix_block_" + name)(self.handle, *[address(t) for t in tensors]))

    def __call__(self):
        p, ok = self.p, self.library.ok
        ok(self.c.loramix_block_route(self.handle, address(p.x), p.case.tokens))
        torch.mm(p.x, p.W1.T, out=self.u)
        torch.mm(p.x, p.W3.T, out=self.v)
        self.stage("mix", self.u, self.v, self.h)
        torch.mm(self.h, p.W2.T, out=self.y)
        self.stage("finish", self.y)
        if not self.train:
            return
        self.stage("finish_backward", p.dy)
        torch.mm(p.dy, p.W2, out=self.dh)
        self.stage("mix_backward", self.u, self.v, self.dh, self.du, self.dv)
        self.dx.addmm_(self.du, p.W1).addmm_(self.dv, p.W3)
        self.stage("route_backward", p.x, self.dx)

    def fresh(self):
        for gradient in self.gradients.values():
            gradient.zero_()
        self.dx.zero_()
        self()
        return {"y": self.y, "dx": self.dx, **self.gradients}


def ours(library, p, threads, train):
    if p.case.kind == "block":
        return OurBlock(library, p, threads, train)
    return OurNorms(library, p, threads) if p.case.kind == "norm" else Ours(library, p, threads, train)
