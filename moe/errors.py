"""Every error this package raises on purpose.

    UserError (ValueError)      the user's mistake: states the rule, the numbers, the way out; exit code 2
    ├── ConfigError             a recipe, an override or a cross-field rule
    ├── DataError               a corpus file, a tokenizer or a cache
    ├── CheckpointError         a checkpoint that is missing, incomplete or of another model
    └── BackendError            an expert backend that cannot run here
    TrainingStopped (RuntimeError)  training ended itself, with the reason (e.g. n non-finite steps in a row)

`run_main` turns them into exit codes: 2 for the user's mistake, 1 for training that stopped itself, 130 for Ctrl-C.
"""

import os
import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that the user can correct; the message says how."""


class ConfigError(UserError):
    """A setting that is unknown, ill-typed or contradicts another."""


class DataError(UserError):
    """A corpus, tokenizer or cache that cannot be used as asked."""


class CheckpointError(UserError):
    """A checkpoint that cannot be saved or loaded as asked."""


class BackendError(UserError):
    """An expert backend that cannot run on this machine or with these tensors."""


class TrainingStopped(RuntimeError):
    """Training stopped itself; the message carries the reason."""


GRACE_SECONDS = 10.0
"""How long a rank other than 0 waits before it speaks: if rank 0 fails as well, torchrun ends it before that."""


def run_main(command: Callable[[], object]) -> int:
    """Run a command to its exit code: the number it returns, or 0; errors are one paragraph on stderr, from rank 0."""
    try:
        result = command()
    except UserError as error:
        return fail(str(error), 2)
    except TrainingStopped as error:
        return fail(str(error), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}: make room, or choose a folder that can be written", 2)
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def fail(message: str, code: int) -> int:
    """Print a message as one paragraph on stderr and return the exit code; other ranks speak if rank 0 does not."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # torchrun ends all ranks once one has failed, so whoever is first must wait for rank 0 to say why
        time.sleep(GRACE_SECONDS)
        message = f"rank {rank}: {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
