"""The draws of MATH.md section 1, written from its text: Philox4x32-10, keys, dropout masks, uniforms, normals."""

import math

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def splitmix64(x):
    """The first output from state x."""
    x = (x + 0x9E3779B97F4A7C15) & M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def fold(k, v):
    return splitmix64(k ^ splitmix64(v))


def site(name):
    """FNV-1a-64."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & M64
    return h


def key_of(seed, name, step):
    return fold(fold(seed, site(name)), step)


def philox(key, counter):
    """Philox4x32-10 (Salmon et al. 2011)."""
    k0, k1 = key & M32, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & M32, (p0 >> 32) ^ c3 ^ k1, p0 & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return [c0, c1, c2, c3]


DROPOUT, NOISE, JITTER, START, SAMPLING = range(5)


def block(key, purpose, token, index):
    return philox(key, (index, purpose, token & M32, token >> 32))


def p16_of(p):
    return math.floor(65536 * p + 0.5)


def keep(key, token, columns, p):
    """0 or 1 for each column: keep where draw16 >= p16."""
    row = []
    for i in range(columns):
        word = block(key, DROPOUT, token, i // 8)[(i % 8) // 2]
        draw16 = (word >> 16) if i % 2 else (word & 0xFFFF)
        row.append(int(draw16 >= p16_of(p)))
    return row


def uniform(key, purpose, row, column):
    return (block(key, purpose, row, column // 4)[column % 4] + 0.5) / 2.0**32


def normal(key, purpose, row, column):
    even = column - column % 2
    radius = math.sqrt(-2 * math.log(uniform(key, purpose, row, even)))
    angle = 2 * math.pi * uniform(key, purpose, row, even + 1)
    return radius * (math.sin(angle) if column % 2 else math.cos(angle))


def known_answers():
    """The numbers that MATH.md prints, and Random123's own for Philox4x32-10."""
    assert philox(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(M64, (M32, M32, M32, M32)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    name = "layers.0.mlp.up_proj"
    assert site(name) == 0xF13FB8F15D1E4C8F
    assert fold(42, site(name)) == 0xA7D0A45EB6EB8F56
    key = key_of(42, name, 3)
    assert key == 0x90AB6CCD94E807C8
    assert block(key, DROPOUT, 5, 0) == [0x4C8A82B6, 0x4B0CB6E7, 0x2F59AA34, 0x354403E4]
    bits = lambda token, p: "".join(map(str, keep(key, token, 20, p)))
    assert bits(5, 0.5) == "10101000010110101101"
    assert bits(5, 0.1) == "11111101111111111111"
    assert bits(7 * 2**32 + 5, 0.5) == "01011011001111110101"


known_answers()
