"""Accelerators by name: peak FLOP/s, bandwidth, memory, links, in plain Python. Vendors' figures for dense matrices.

A peak is the vendor's promise at boost clock, seldom reached: cuBLAS gets about 80 % of an H100's in bfloat16.
"""

import re
from dataclasses import dataclass

# Words that a device's name holds; TFLOP/s of dense products ("-": no such unit), in 16 and 8 bits with float32
# accumulation; TB/s and GB (10^9) of device memory; KiB of shared memory (LDS) per multiprocessor; and the vendor's
# document, "halved" if it prints the doubled figure of structured sparsity only. The first matching row counts. Of an
# MI250X, torch sees each die as a device.
_TABLE = """
device name    | arch   |   bf16 |   fp16 |  tf32 |  fp32 |    fp8 |  TB/s |  GB | KiB | source
v100 sxm2      | sm_70  |      - |    125 |     - |  15.7 |      - |   0.9 |  32 |  96 | V100 datasheet
t4             | sm_75  |      - |     65 |     - |   8.1 |      - |  0.32 |  16 |  64 | T4 datasheet
a100 sxm4 80gb | sm_80  |    312 |    312 |   156 |  19.5 |      - | 2.039 |  80 | 164 | A100 datasheet
a100 sxm4 40gb | sm_80  |    312 |    312 |   156 |  19.5 |      - | 1.555 |  40 | 164 | A100 datasheet
a100 pcie 80gb | sm_80  |    312 |    312 |   156 |  19.5 |      - | 1.935 |  80 | 164 | A100 datasheet
a100 pcie 40gb | sm_80  |    312 |    312 |   156 |  19.5 |      - | 1.555 |  40 | 164 | A100 datasheet
a10            | sm_86  |    125 |    125 |  62.5 |  31.2 |      - |   0.6 |  24 | 100 | A10 datasheet
rtx a6000      | sm_86  |  154.8 |  154.8 |  77.4 |  38.7 |      - | 0.768 |  48 | 100 | GA102 whitepaper
rtx 3090       | sm_86  |     71 |     71 |  35.6 |  35.6 |      - | 0.936 |  24 | 100 | GA102 whitepaper
rtx 4090       | sm_89  |  165.2 |  165.2 |  82.6 |  82.6 |  330.3 | 1.008 |  24 | 100 | Ada whitepaper
rtx 6000 ada   | sm_89  |  364.2 |  364.2 | 182.1 |  91.1 |  728.5 |  0.96 |  48 | 100 | Ada whitepaper
l4             | sm_89  |    121 |    121 |    60 |  30.3 |  242.5 |   0.3 |  24 | 100 | L4 datasheet, halved
l40            | sm_89  | 181.05 | 181.05 |  90.5 |  90.5 |    362 | 0.864 |  48 | 100 | L40 datasheet
l40s           | sm_89  | 362.05 | 362.05 |   183 |  91.6 |    733 | 0.864 |  48 | 100 | L40S datasheet
h100 hbm3      | sm_90  |  989.4 |  989.4 | 494.7 |  66.9 | 1978.9 |  3.35 |  80 | 228 | H100 whitepaper
h100 nvl       | sm_90  |  835.5 |  835.5 | 417.5 |    60 | 1670.5 |   3.9 |  94 | 228 | H100 datasheet, halved
h100 pcie      | sm_90  |    756 |    756 |   378 |  51.2 |   1513 |     2 |  80 | 228 | H100 whitepaper
h800           | sm_90  |  989.4 |  989.4 | 494.7 |  66.9 | 1978.9 |  3.35 |  80 | 228 | as H100 SXM
h20            | sm_90  |    148 |    148 |    74 |    44 |    296 |     4 |  96 | 228 | H20 datasheet
gh200 480gb    | sm_90  |  989.4 |  989.4 | 494.7 |  66.9 | 1978.9 |     4 |  96 | 228 | GH200 datasheet, halved
h200 nvl       | sm_90  |  835.5 |  835.5 | 417.5 |    60 | 1670.5 |   4.8 | 141 | 228 | H200 datasheet, halved
h200           | sm_90  |  989.4 |  989.4 | 494.7 |  66.9 | 1978.9 |   4.8 | 141 | 228 | H200 datasheet, halved
b200           | sm_100 |   2250 |   2250 |  1125 |    75 |   4500 |     8 | 180 | 228 | DGX B200 datasheet / 8
gb200          | sm_100 |   2500 |   2500 |  1250 |    80 |   5000 |     8 | 186 | 228 | GB200 NVL72 datasheet / 72
b300           | sm_103 |   2250 |   2250 |  1125 |    75 |   4500 |     8 | 270 | 228 | HGX B300 datasheet / 8
rtx 5090       | sm_120 |  209.5 |  209.5 | 104.8 | 104.8 |    419 | 1.792 |  32 | 100 | RTX Blackwell whitepaper
mi250x         | gfx90a |  191.5 |  191.5 |     - |  47.9 |      - | 1.638 |  64 |  64 | MI250X datasheet / 2
mi300x         | gfx942 | 1307.4 | 1307.4 | 653.7 | 163.4 | 2614.9 |   5.3 | 192 |  64 | MI300X datasheet
mi325x         | gfx942 | 1307.4 | 1307.4 | 653.7 | 163.4 | 2614.9 |     6 | 256 |  64 | MI325X datasheet
mi350x         | gfx950 | 2306.9 | 2306.9 |     - | 144.2 | 4613.7 |     8 | 288 | 160 | MI350X datasheet
mi355x         | gfx950 | 2516.6 | 2516.6 |     - | 157.3 | 5033.2 |     8 | 288 | 160 | MI355X datasheet
"""
_OTHER_PEAKS = {"mig", "laptop", "d", "max"}
"""Words that mark a slice of a chip, or a slower chip of nearly the same name."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as torch sees it."""

    name: str
    words: frozenset[str]
    """A device name with all of these words is this chip."""
    arch: str
    """Compilation target."""
    bf16: float | None
    """Peak FLOP/s of bfloat16 products; None if the chip has no unit for them. Likewise below."""
    fp16: float
    tf32: float | None
    fp32: float
    fp8: float | None
    bandwidth: float
    """Bytes per second to and from device memory."""
    memory: int
    """Bytes of device memory, as on the label."""
    shared_memory: int
    """Bytes of shared memory per multiprocessor."""
    source: str
    """Vendor's document."""


def _row(line: str) -> Chip:
    words, arch, bf16, fp16, tf32, fp32, fp8, bandwidth, memory, shared, source = map(str.strip, line.split("|"))
    return Chip(
        name=words.upper(),
        words=frozenset(words.split()),
        arch=arch,
        bf16=_peak(bf16),
        fp16=float(fp16) * 1e12,
        tf32=_peak(tf32),
        fp32=float(fp32) * 1e12,
        fp8=_peak(fp8),
        bandwidth=float(bandwidth) * 1e12,
        memory=int(memory) * 10**9,
        shared_memory=int(shared) * 1024,
        source=source,
    )


def _peak(text: str) -> float | None:
    return None if text == "-" else float(text) * 1e12


CHIPS: tuple[Chip, ...] = tuple(_row(line) for line in _TABLE.strip().splitlines()[1:])


def find(device_name: str) -> Chip | None:
    """The chip that a device name such as "NVIDIA H100 80GB HBM3" stands for; None if it is not in the table."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & _OTHER_PEAKS:
        return None
    return next((chip for chip in CHIPS if chip.words <= words), None)


# ------------------------------------------------------------------------------------------------------------- links

# GPUs that the fast links join; GB/s of one GPU to the others of its node, one way (half of what vendors print, who add
# both directions); GB/s of one GPU's share of the network, one way, in the vendor's own system; and where that stands.
_LINKS = """
name           | joined | GB/s | network | source
v100 sxm2      |      8 |  150 |   6.25 | 6 NVLink 2 of 25; DGX-1, 4 x 100 Gb/s for 8
a100 sxm4 80gb |      8 |  300 |     25 | 12 NVLink 3 of 25; DGX A100, 200 Gb/s each
a100 sxm4 40gb |      8 |  300 |     25 | 12 NVLink 3 of 25; DGX A100, 200 Gb/s each
h100 hbm3      |      8 |  450 |     50 | 18 NVLink 4 of 25; DGX H100, 400 Gb/s each
h800           |      8 |  200 |     50 | 8 NVLink 4 of 25; arXiv 2412.19437, 400 Gb/s each
h20            |      8 |  450 |     50 | 18 NVLink 4 of 25; 400 Gb/s each, as DGX H100
h200           |      8 |  450 |     50 | 18 NVLink 4 of 25; DGX H200, 400 Gb/s each
b200           |      8 |  900 |     50 | 18 NVLink 5 of 50; DGX B200, 400 Gb/s each
gb200          |     72 |  900 |     50 | 18 NVLink 5 of 50; GB200 NVL72, 400 Gb/s each
b300           |      8 |  900 |    100 | 18 NVLink 5 of 50; DGX B300, 800 Gb/s each
mi300x         |      8 |  448 |     50 | 7 Infinity Fabric of 64; 400 Gb/s each assumed
mi325x         |      8 |  448 |     50 | 7 Infinity Fabric of 64; 400 Gb/s each assumed
l40s           |      8 |   32 |  12.5 | PCIe 4 x16; 100 Gb/s each assumed
l4             |      8 |   32 |  12.5 | PCIe 4 x16; 100 Gb/s each assumed
a10            |      8 |   32 |  12.5 | PCIe 4 x16; 100 Gb/s each assumed
rtx 4090       |      8 |   32 |  3.125 | PCIe 4 x16; 25 Gb/s each assumed
rtx 5090       |      8 |   64 |  3.125 | PCIe 5 x16; 25 Gb/s each assumed
"""


@dataclass(frozen=True, kw_only=True)
class Links:
    """What joins the GPUs of one kind: rates are one way, for one GPU, as the vendor promises them."""

    joined: int
    """GPUs of a node, which reach each other at `node`."""
    node: float
    """Bytes per second to the other GPUs of the node."""
    network: float
    """Bytes per second to GPUs of other nodes."""
    source: str


def _links(line: str) -> tuple[str, Links]:
    name, joined, node, network, source = map(str.strip, line.split("|"))
    return name.upper(), Links(joined=int(joined), node=float(node) * 1e9, network=float(network) * 1e9, source=source)


LINKS: dict[str, Links] = dict(map(_links, _LINKS.strip().splitlines()[1:]))
"""By the name of the chip; chips without an entry are sold in too many systems to name one."""
