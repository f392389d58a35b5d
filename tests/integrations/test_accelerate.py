"""accelerate's ``prepare``, ``save_state`` and ``load_state``, as training.md describes them: a run
resumed within an epoch or at its end is the whole one to the bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import stablelora_kernels as slk
from tests.helpers.trainer_runs import (
    KINDS,
    SETTINGS,
    llama,
    results_of,
    rows,
)
from tests.integrations.test_hf_trainer import assert_same_bits

accelerate = pytest.importorskip(
    "accelerate", reason="runs where accelerate is installed: pip install .[test]"
)

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS, SIZE, SAVED_IN = 3, 8, 1
BATCHES = len(rows()) // SIZE


@pytest.mark.parametrize("batch", [1, BATCHES], ids=["within an epoch", "at its end"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_bit(kind: str, batch: int, tmp_path: Path) -> None:
    whole = run(kind, tmp_path, batch)
    assert_same_bits(run(kind, tmp_path, batch, resumed=True), whole)


def run(kind: str, place: Path, batch: int, resumed: bool = False) -> dict[str, Any]:
    """The whole run, saved after ``batch`` batches of an epoch; or the rest of it, in a model whose
    adapters are others. The generators' states of another run must not matter.
    """
    base_seed = 9 if resumed and kind == "ours" else 0
    model = llama(kind, base_seed, 7 if resumed else 0, dropout=0.2).train()
    torch.manual_seed(1234 if resumed else 5)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = slk.StableLoRAAdamW.from_model(model, **SETTINGS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=EPOCHS * BATCHES)
    generator = torch.Generator()
    ids = [torch.tensor(row["input_ids"]) for row in rows()]
    loader = DataLoader(ids, batch_size=SIZE, shuffle=True, generator=generator)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    done = 0
    if resumed:
        accelerator.load_state(str(place))
        done = SAVED_IN * BATCHES + batch
    for epoch in range(done // BATCHES, EPOCHS):
        generator.manual_seed(epoch)
        for inputs in accelerator.skip_first_batches(loader, done % BATCHES):
            accelerator.backward(model(input_ids=inputs, labels=inputs).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if not resumed and done == SAVED_IN * BATCHES + batch:
                accelerator.save_state(str(place))
    assert done == EPOCHS * BATCHES
    return results_of(optimizer, schedule, model)
