#!/usr/bin/env python3
"""Writes python.hpp: the bytes of a file written by the safetensors package (0.8.0, numpy 2.4.6), the other side.

    python3 -m venv v && v/bin/pip install safetensors numpy && v/bin/python tests/io/golden/make.py

Tests include the result; nobody needs to run this.
"""

import pathlib

import numpy
from safetensors.numpy import save

tensors = {
    "m.lora_A.weight": numpy.arange(6, dtype=numpy.float32).reshape(2, 3) / 4 - 1,
    "m.lora_B.weight": numpy.arange(8, dtype=numpy.float32).reshape(4, 2) * 0.125,
    "half": numpy.array([1.5, -0.25, 65504], dtype=numpy.float16),
    "double": numpy.array(0.1, dtype=numpy.float64),
    "ids": numpy.array([[1, -2]], dtype=numpy.int64),
    "none": numpy.zeros((0, 5), dtype=numpy.float32),
    "flag": numpy.array([True, False, True]),
}
metadata = {"loramix.adapter.m": '{"kind":"lora","config":{"d_in":3,"d_out":4,"rank":2,"alpha":4,"dropout":0.1,"rank_stabilised":false}}'}
data = save(tensors, metadata)
lines = "".join("    \"" + "".join(f"\\x{byte:02x}" for byte in data[i:i + 28]) + "\"\n" for i in range(0, len(data), 28))
pathlib.Path(__file__).with_name("python.hpp").write_text(f"""// {len(data)} bytes written by golden/make.py.
#pragma once

inline constexpr char python_file[] =
{lines.rstrip()};
inline constexpr int python_file_size = {len(data)};
""")
