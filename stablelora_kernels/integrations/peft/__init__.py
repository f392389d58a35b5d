"""PEFT's models on this library's ops.

``accelerate.py`` has :func:`accelerate_peft` and what undoes it, ``read.py`` what a layer is read as,
``layers.py`` and ``experts.py`` the forwards, ``dora.py`` DoRA's norms, ``faults.py`` and
``wrappers.py`` what PEFT does with experts, ``rows.py`` and ``rows_state.py`` ``adapters_of_rows``,
``merging.py`` exact unmerging, ``merged.py`` what ``merged_parameters`` reads of PEFT's layers.
Importing this package, ``rows.py``, ``rows_state.py`` and ``merging.py`` needs no peft.
"""

from stablelora_kernels.integrations.peft.accelerate import (
    accelerate_options,
    accelerate_peft,
    check_accelerate_options,
    restore_peft,
)

__all__ = ["accelerate_options", "accelerate_peft", "check_accelerate_options", "restore_peft"]
