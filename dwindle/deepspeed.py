"""DeepSpeed's compression functions under their old names: `from dwindle.deepspeed import init_compression`."""

from .frontends.deepspeed.compression import (
    convert_conv1d_to_linear,
    init_compression,
    redundancy_clean,
    student_initialization,
)

__all__ = ["convert_conv1d_to_linear", "init_compression", "redundancy_clean", "student_initialization"]
