"""`moe profile`: what the expert layer's kernels cost on a named chip, predicted, compiled, and measured if there is a GPU.

The prediction is moe_triton.prediction's: counted from the tiles that the tuning table gives, for a routing that is uniform,
Zipf-distributed or recorded by a run. Beside it stand the compiler's facts about the same launches, and the floors of two
other published dataflows. Times are measured only where the process sees a GPU.
"""

from moe.profile.command import profile
from moe.profile.facts import compiled_facts
from moe.profile.inputs import shape_of

__all__ = ["compiled_facts", "profile", "shape_of"]
