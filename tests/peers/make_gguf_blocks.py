"""Writes tests/golden/gguf_blocks.json: random GGUF blocks and what the gguf package decodes them to.

Needs: pip install gguf numpy. Run from the repository root.
"""
import json

import gguf
import numpy as np
from gguf.quants import dequantize

NAMES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "BF16"]
# Byte positions of half-precision fields in a block: random ones would often be infinite.
HALF_FIELDS = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
               "Q6_K": [208], "BF16": []}


def main():
    random = np.random.default_rng(7)
    blocks = {}
    for name in NAMES:
        kind = gguf.GGMLQuantizationType[name]
        _, size = gguf.GGML_QUANT_SIZES[kind]
        if name == "BF16":
            data = random.normal(size=64).astype(np.float32).view(np.uint16)[1::2].copy().view(np.uint8)[None]
        else:
            data = random.integers(0, 256, (1, 3 * size), dtype=np.uint8)
            for block in range(3):
                for field in HALF_FIELDS[name]:
                    half = np.array([random.normal() * 0.05], np.float16).view(np.uint8)
                    data[0, block * size + field:block * size + field + 2] = half
        values = dequantize(data, kind)
        blocks[name] = {"bytes": data.ravel().tolist(), "values": [float(v) for v in values.ravel()]}
    golden = {"doc": "Random blocks of GGUF's formats and their float32 values.",
              "source": {"package": "gguf", "version": "0.19.0", "license": "MIT", "functions": ["quants.dequantize"]},
              "blocks": blocks}
    with open("tests/golden/gguf_blocks.json", "w") as out:
        json.dump(golden, out)


main()
