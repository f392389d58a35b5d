"""Every planted fault still has its text in the package and its tests in the suite. Whether they
notice it is the night's.
"""

from __future__ import annotations

import shlex

from tests.mutants.__main__ import PLANTED, ROOT, planted, read


def test_every_fault_can_be_planted():
    faults = [*read(PLANTED.read_text(encoding="utf-8"))]
    assert len({fault.id for fault in faults}) == len(faults) > 150
    for fault in faults:
        source = (ROOT / "stablelora_kernels" / fault.file).read_text(encoding="utf-8")
        changed = planted(source, fault)
        assert changed != source, fault.id
        compile(changed, fault.file, "exec")
        assert all(
            (ROOT / word).exists() for word in shlex.split(fault.tests) if word.startswith("tests/")
        ), fault.id
