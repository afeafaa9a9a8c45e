"""Importing the package changes nothing, loads nothing and takes no time."""

import json
import subprocess
import sys

import pytest

OPTIONAL = (
    "torch", "numpy", "transformers", "diffusers", "rich", "plotly", "jinja2", "tokenizers", "triton", "scipy",
    "sklearn", "safetensors",
)  # fmt: skip


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_loads_neither_torch_nor_any_optional_library():
    loaded = python("import json, sys, regard; print(json.dumps(sorted(sys.modules)))")
    assert not set(OPTIONAL) & set(loaded)


def test_using_the_library_loads_no_optional_library():
    code = """
import json, sys, torch
before = set(sys.modules)
import regard
q = torch.randn(1, 2, 4, 8)
regard.attend(q, q, q, pattern=regard.Causal())
regard.mixer("based", 16, 2)(torch.randn(1, 4, 16), is_causal=True)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    optional = set(OPTIONAL) - {"torch", "numpy", "safetensors"}
    assert not optional & {name.partition(".")[0] for name in python(code)}


def test_import_takes_less_than_three_tenths_of_a_second():
    code = "import time; t = time.process_time(); import regard; print(time.process_time() - t)"
    assert min(python(code) for _ in range(3)) < 0.3


def test_import_changes_nothing_in_torch():
    code = """
import json, torch, torch.nn.functional as F
before = (F.scaled_dot_product_attention, torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state())
import regard
regard.attend, regard.softmax_attention, regard.mixer
after = (F.scaled_dot_product_attention, torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state())
print(json.dumps([before[:3] == after[:3], bool((before[3] == after[3]).all())]))
"""
    assert python(code) == [True, True]


def test_an_unknown_name_is_an_attribute_error_with_near_ones():
    import regard

    with pytest.raises(AttributeError, match="did you mean 'sigmoid_attention'"):
        regard.sigmoid_atention  # noqa: B018
    with pytest.raises(ImportError):
        exec("from regard import no_such_thing")
    assert "softmax_attention" in dir(regard)
