"""Outlier twins, and the check that keeps a format from a model on which it would collapse."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from twins import outlier_twin

from kvtool.config import KVOptions
from kvtool.kv.format import resolve
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.models import load_config, load_model
from kvtool.models.resolve import EMBEDDED
from kvtool.quantize.layer_errors import calibrate, outlier, propagated_errors

TINY = EMBEDDED["tiny"]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outlier_twin(TINY, tmp_path_factory.mktemp("models") / "twin")


@pytest.mark.parametrize("value_bias", [0.0, 0.5])
def test_a_twin_is_the_same_function(tmp_path, value_bias):
    twin = outlier_twin(TINY, tmp_path / "twin", scale=48.0 if value_bias else 64.0, value_bias=value_bias)
    ids = torch.randint(0, 4096, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, other = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64)(ids).logits for f in (TINY, twin))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
