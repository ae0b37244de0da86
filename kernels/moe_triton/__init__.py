"""Triton kernels for Mixture-of-Experts layers: functions from tensors to tensors that know nothing of `moe`.

`moe_triton.reference` is the specification in plain torch and imports without triton; `moe_triton.chips` needs neither.
"""
