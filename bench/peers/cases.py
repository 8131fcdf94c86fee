"""What is compared: the peers table of SPEED.md ("speed/...") and shapes B1 to B16 of PEERS 4.8, none left out.

A case names its shape, its gate and its peers. A peer that cannot run there is in `left_out`, with the reason.
"""
import dataclasses
import math
from typing import Dict, Tuple

MIXED_RANKS = (8, 16, 32, 64)
MOST_GATHERED = 2**27  # bytes of weights, for the per-token gather
BOTH, FORWARD = ("forward", "train"), ("forward",)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    kind: str                          # of gate: see Problem in problem.py
    tokens: int
    d_in: int
    d_out: int
    ranks: int                         # in all
    experts: int = 1
    chosen: int = 0                    # per token; 0: all
    passes: Tuple[str, ...] = BOTH
    scalar: str = "float32"
    dropout: float = 0.0
    rank_of: Tuple[int, ...] = ()      # of each adapter, where they differ
    cold: bool = False                 # weights that no cache holds: many copies gone round
    peers: Tuple[str, ...] = ()
    left_out: Dict[str, str] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def shared(self):
        return self.kind == "shared"

    @property
    def rank(self):
        return self.ranks // self.experts

    @property
    def ranks_of_a(self):
        return self.rank if self.shared else self.ranks

    @property
    def warm_allocator(self):
        """Whether temporaries are large enough for the allocator to matter."""
        return self.tokens >= 256 and self.kind != "norm"

    def weight_bytes(self):
        return (self.ranks_of_a * self.d_in + self.ranks * self.d_out) * (4 if self.scalar == "float32" else 2)


STACKED = ("addmm", "torch.compile")
LORA = (*STACKED, "PEFT")
DENSE = (*STACKED, "addmm per expert", "loop", "class", "X-LoRA")
TOP_K = (*STACKED, "gather loop", "sorted", "class", "X-LoRA")
SERVED = ("addmm", "gather loop", "sorted", "per-token gather", "PEFT mixed batch")


def gathered(tokens, chosen, ranks, width):
    return f"would gather {tokens * chosen * ranks * width * 4 / 2**20:.0f} MiB of weights in every call"


def top_k(name, tokens, d_in, d_out, rank, experts, chosen, peers=TOP_K, **more):
    left_out = {}
    if tokens * chosen * rank * (d_in + d_out) * 4 <= MOST_GATHERED:
        peers = (*peers, "per-token gather")
    else:
        left_out["per-token gather"] = gathered(tokens, chosen, rank, d_in + d_out)
    return Case(name, "top_k", tokens, d_in, d_out, rank * experts, experts, chosen, peers=peers, left_out=left_out, **more)


def served(name, tokens, d_in, d_out, rank_of, **more):
    peers, left_out = list(SERVED), {}
    ranks = sum(rank_of)
    if tokens * max(rank_of) * (d_in + d_out) * 4 > MOST_GATHERED:
        peers.remove("per-token gather")
        left_out["per-token gather"] = gathered(tokens, 1, max(rank_of), d_in + d_out)
    if ranks > 4096:
        peers.remove("addmm")
        left_out["addmm"] = f"would compute all {ranks} ranks for every token"
    return Case(name, "served", tokens, d_in, d_out, ranks, len(rank_of), 1, passes=FORWARD, rank_of=tuple(rank_of),
                peers=tuple(peers), left_out=left_out, **more)


def speed_table():
    d = 4096
    for tokens in (16, 256, 2048):
        yield Case(f"speed/dense/T{tokens}", "dense", tokens, d, d, 128, 8, peers=DENSE)
    for tokens in (16, 256, 2048):
        yield top_k(f"speed/top2/T{tokens}", tokens, d, d, 16, 8, 2)
    yield Case("speed/lora/T1", "lora", 1, d, d, 16, passes=FORWARD, cold=True, peers=LORA)
    for tokens in (16, 256, 2048):
        yield Case(f"speed/lora/T{tokens}", "lora", tokens, d, d, 16, peers=LORA)
    for tokens in (256, 2048):
        yield Case(f"speed/shared/T{tokens}", "shared", tokens, d, d, 128, 8, peers=(*STACKED, "loop", "class"))
    for name, ranks, experts in (("E8-r16", 128, 8), ("r16", 16, 1), ("r64", 64, 1)):
        peers = (*STACKED, "addmm per expert", "loop") if experts > 1 else STACKED
        yield Case(f"speed/bfloat16/{name}", "dense" if experts > 1 else "lora", 2048, d, d, ranks, experts,
                   passes=FORWARD, scalar="bfloat16", peers=peers)


def shapes():
    """B1 to B16."""
    d, wide = 4096, 11008
    for scalar in ("float32", "bfloat16"):
        for r in (8, 16, 64):
            yield Case(f"B1/r{r}/{scalar}", "lora", 512, d, d, r, scalar=scalar, peers=("addmm", "PEFT"))
    for experts in (2, 4, 8):  # the total rank stays
        yield Case(f"B2/k{experts}", "dense", 512, d, wide, 128, experts,
                   peers=("addmm", "addmm per expert", "loop", "class", "MOELoRA", "X-LoRA"))
        yield Case(f"B2/k{experts}/team", "team", 512, d, wide, 128, experts, peers=("addmm", "class"))
    yield Case("B3", "shared", 512, d, wide, 16, 4, peers=("addmm", "loop", "class"))
    yield Case("B4", "dense", 512, d, d, 32, 8, peers=("addmm", "addmm per expert", "loop", "class", "X-LoRA"))
    yield top_k("B5", 2048, d, d, 8, 8, 2, peers=("addmm", "gather loop", "sorted", "class", "X-LoRA"))
    yield Case("B6", "block", 512, d, wide, 128, 8, 2, peers=("gather loop", "sorted"))
    yield top_k("B7", 1024, 1024, 1024, 128, 16, 2, peers=("addmm", "gather loop", "sorted", "class"))
    for tokens in (1, 4, 16, 64):  # one adapter, about √T, all different
        for adapters in sorted({1, math.isqrt(tokens - 1) + 1, tokens}):
            yield served(f"B8/T{tokens}/L{adapters}", tokens, d, wide, (16,) * adapters, cold=tokens == 1)
    for tokens in (64, 256):
        for adapters in (1, 5, 100, 1000):
            yield served(f"B9/T{tokens}/L{adapters}", tokens, d, d, [MIXED_RANKS[i % 4] for i in range(adapters)])
    for tokens in (2048, 8192):
        yield Case(f"B10/T{tokens}", "lora", tokens, d, d, 16, dropout=0.1, peers=("addmm", "PEFT"))
    for d_out in (1024, 4096):
        for r in (8, 32, 128, 256):
            yield Case(f"B11/{d_out}/r{r}", "lora", 32768, 1024, d_out, r, peers=("addmm", "PEFT"))
    yield Case("B12", "prefix", 4096, 768, 3072, 8, peers=("addmm", "loop"),
               left_out={"class": "MoRE's own class takes one task per batch; its form is the loop"})
    for tokens in (1, 16, 128, 1024):  # 128 experts of each of 8 adapters: 1024 to choose from
        few = tokens <= 16
        case = top_k(f"B13/T{tokens}", tokens, 3072, 2688, 32, 1024, 2, passes=FORWARD, cold=tokens == 1,
                     peers=("addmm",) * few + ("gather loop", "sorted"))
        if not few:
            case.left_out["addmm"] = "would compute 32768 ranks for every token, of which 64 are open"
        yield case
    yield Case("B14", "segments", 512, d, d, 64, 8, 1, peers=("addmm", "loop", "PEFT mixed batch"))
    for d_out, r in ((d, 8), (d, 64), (wide, 8), (wide, 64)):
        yield Case(f"B15/{d_out}/r{r}", "norm", 0, d, d_out, r, passes=FORWARD, peers=("low-rank form", "PEFT"))
    yield Case("B16", "lora", 1, d, d, 16, passes=FORWARD, cold=True, peers=("addmm", "PEFT"))


CASES = [*speed_table(), *shapes()]
FAILED = "*"  # the peer of a row that says what went wrong with all of them
QUICK = ("speed/dense/T256", "speed/top2/T256", "speed/lora/T16", "speed/lora/T256", "B3", "B14")
