"""A profile's figures as JSON."""

from dataclasses import asdict
from typing import Any

from moe.profile.inputs import Routing
from moe_triton import roofline
from moe_triton.prediction import Kernel
from moe_triton.roofline import Machine, Shape

Json = dict[str, Any]
LEFT_OUT = (
    "left out of the prediction: launch latency, a tile's prologue and epilogue, how far triton's main loop stays below "
    "the rate of large products, loads that do not hide, clocks under power"
)


def record_of(
    shape: Shape,
    machine: Machine,
    routing: Routing,
    predictions: list[list[Kernel]],
    slowest: int,
    compiled: list[Json] | str,
    measured: dict[str, float] | None,
) -> Json:
    """Every figure of the profile; `slowest` is the layer whose kernels are listed."""
    kernels = predictions[slowest]
    floors = {flow: roofline.floor_seconds(shape, machine, flow) for flow in roofline.FLOWS}
    return {
        "schema_version": 1,
        "shape": {**asdict(shape), "R": shape.R},
        "chip": _chip(machine),
        "routing": {
            "origin": routing.origin,
            "layer": routing.layers[slowest] if routing.layers else None,
            "layers": len(routing.layers),
            "mean_seconds": sum(sum(kernel.seconds for kernel in layer) for layer in predictions) / len(predictions),
        },
        "kernels": [_kernel(kernel, measured or {}) for kernel in kernels],
        "seconds": sum(kernel.seconds for kernel in kernels),
        "l2_bound_seconds": sum(max(kernel.seconds, kernel.l2_seconds or 0.0) for kernel in kernels)
        if machine.l2_bandwidth
        else None,
        "floor_seconds": {flow: {"forward": fwd, "backward": bwd} for flow, (fwd, bwd) in floors.items()},
        "useful_flops": roofline.useful_flops(shape),
        "saved_bytes": {flow: roofline.saved_bytes(shape, flow) for flow in (*floors, "recompute_hidden")},
        "launches": {
            "routing": roofline.ROUTING_LAUNCHES,
            "forward": sum(not kernel.backward for kernel in kernels),
            "backward": sum(kernel.backward for kernel in kernels) + roofline.SMALL_LAUNCHES,
        },
        "left_out": LEFT_OUT,
        "compiled": compiled,
        "measured": measured,
    }


def _kernel(kernel: Kernel, measured: dict[str, float]) -> Json:
    return {
        "name": kernel.name,
        "pass": "backward" if kernel.backward else "forward",
        "config": kernel.config,
        "flops": kernel.flops,
        "tile_flops": kernel.tile_flops,
        "bytes": kernel.bytes,
        "floor_bytes": kernel.floor_bytes,
        "intensity": kernel.intensity,
        "tiles": kernel.tiles,
        "tile_share": kernel.tile_share,
        "wave_share": kernel.wave_share,
        "bound": kernel.bound,
        "floor_seconds": kernel.floor_seconds,
        "seconds": kernel.seconds,
        "l2_seconds": kernel.l2_seconds,
        "measured_seconds": measured.get(kernel.name),
    }


def _chip(machine: Machine) -> Json:
    return {
        "name": machine.name,
        "arch": machine.chip.arch,
        "flops": machine.flops,
        "bandwidth": machine.bandwidth,
        "vendor_flops": machine.chip.bf16,
        "basis": machine.basis,
    }
