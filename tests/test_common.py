"""
The tests that transformers runs on every one of its models and processors, on ours and on the stock classes.

They come with the source distribution of transformers, which `make test-extras` downloads. What they found stands in
docs/common_tests.md: the test fails where that is no longer so, and prints what it should say.
"""

import importlib
import os
import re
import sys
import tarfile
import unittest
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny
import torch
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from hf_sugar import SugarConfig, SugarForConditionalGeneration, SugarProcessor


pytestmark = pytest.mark.extras

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "common_tests.md"
SOURCE = ROOT / ".cache" / f"transformers-{transformers.__version__}.tar.gz"

# What the test files import and the source distribution does not have. The first two are mixins, whose tests are not run;
# the last finds the local copy of a picture.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "../fetch_hub_objects_for_ci.py": (
        "from pathlib import Path\n\n\ndef url_to_local_path(url):\n    return str(Path(__file__).with_name('image.png'))\n"
    ),
}

NO_GRADIENT = "Wants a gradient in every weight. CLIP's `post_layernorm` has none in LLaVA"
REFUSED = "Wants a checkpoint loaded that lacks weights. It is refused."
WHY = {
    "test_correct_missing_keys": REFUSED,
    "test_model_weights_reload_no_missing_tied_weights": REFUSED,
    "test_generation_tester_mixin_inheritance": "The generation mixin is not in the source distribution.",
    "test_keep_in_fp32_modules": (
        "Wants bfloat16 in the modules of `_keep_in_fp32_modules`. The projector is float32 there too, and it has to be "
        "in that list, not in the strict one, because quantizers read it."
    ),
    "test_training_gradient_checkpointing": f"{NO_GRADIENT}; nor has the projector, which is not in the loss of `forward`.",
}


@pytest.fixture(scope="module")
def mixins(tmp_path_factory, pytestconfig):
    """Finds the test files of transformers by their name; they run on the CPU whatever there is."""
    if not SOURCE.is_file():
        pytest.skip(f"{SOURCE.relative_to(ROOT)} is not there; `make test-extras` downloads it")
    pytest.importorskip("parameterized", reason="parameterized is not installed; `make test-extras` installs it")
    path = tmp_path_factory.mktemp("source")
    package = path / "transformers_tests"
    package.mkdir()
    with tarfile.open(SOURCE) as archive:
        for member in archive.getmembers():
            if re.fullmatch(r"[^/]+/tests/test_\w+_common\.py", member.name):
                (package / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    for name, text in STUBS.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text)
    tiny.image().save(path / "image.png")
    flash = [f"flash_attn_{version}test" for version in ("", "3_", "4_")]
    for mark in ("accelerate_tests", *flash, "torch_compile_test", "slow"):
        pytestconfig.addinivalue_line("markers", mark)
    # the mixins look the class up among those of transformers, to know that it has labels
    names = {"sugar": SugarForConditionalGeneration.__name__}
    with (
        patch.dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, names),
        patch.dict(os.environ, TRANSFORMERS_TEST_DEVICE="cpu"),
        patch.object(sys, "path", [str(path), *sys.path]),
    ):
        yield lambda name: importlib.import_module(f"transformers_tests.{name}")


class ModelTester:
    """What the model mixin asks for: a configuration, inputs, and what is in them."""

    batch_size = 7  # of the mixin's comparison of attention implementations
    seq_length = encoder_seq_length = key_length = 12
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True
    vision_config = {"num_hidden_layers": 2}

    def __init__(self, sugar: bool):
        self.sugar = sugar

    def prepare_config_and_inputs_for_common(self):
        # a new one, without what the model that it comes from has settled
        config = LlavaConfig.from_dict(tiny.llava().config.to_dict())
        config.vision_config.num_hidden_layers = 2
        config.vision_feature_layer = -1  # all of them are used
        input_ids = torch.randint(5, 350, (self.batch_size, self.seq_length))
        input_ids[:, 1:5] = config.image_token_id
        pixels = torch.rand(self.batch_size, 3, 28, 28)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}
        if self.sugar:
            config = SugarConfig(vlm_config=config, retrieval_dim=16)
            inputs["slice_ids"] = torch.full_like(input_ids, -1)
            inputs["slice_ids"][:, 1:5] = 0
            inputs["slice_ids"][:, -1] = 1
        return config, inputs


class Outcomes(unittest.TestResult):
    """What became of each test, and the reason of a skip or the traceback of a failure."""

    def __init__(self):
        super().__init__()
        self.outcomes = {}

    def addSuccess(self, test):
        self.outcomes.setdefault(test._testMethodName, ("passed", ""))

    def addSkip(self, test, reason):
        test = getattr(test, "test_case", test)  # of a part of a test
        self.outcomes.setdefault(test._testMethodName, ("skipped", reason))

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.outcomes[test._testMethodName] = ("failed", self.failures[-1][1])

    addError = addFailure

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.addFailure(test, error)


def table(stock: dict, sugar: dict) -> str:
    """How many passed, and those that fail or end otherwise than with the stock class."""
    counts = []
    for name, found in (("stock class", stock), ("Sugar", sugar)):
        count = Counter(outcome for outcome, _ in found.values())
        counts.append(f"{name}: {count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
    rows = []
    for name in sorted(stock):
        (before, reason), (after, why) = stock[name], sugar[name]
        if after == "failed":
            known = [text for start, text in WHY.items() if name.startswith(start)]
            assert known, f"{name} fails: mend the class, or say in WHY why it cannot pass.\n{why}"
            why = known[0]
        if after == "failed" or after != before:
            rows.append(f"| {before} | {after} | `{name}` | {why or reason} |")
    if rows:
        rows = ["", "| stock class | Sugar | test | why |", "|---|---|---|---|", *rows]
    return "\n".join(["; ".join(counts) + ".", *rows, ""])


def check(*cases: type[unittest.TestCase]):
    results = []
    for case in cases:
        results.append(Outcomes())
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(results[-1])
    found = table(*(result.outcomes for result in results))
    assert found in DOCUMENT.read_text(encoding="utf-8"), found


def test_models(mixins):
    common = mixins("test_modeling_common")

    class Stock(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (LlavaForConditionalGeneration,)
        additional_model_inputs = ["pixel_values"]
        test_can_init_all_missing_weights_before_2023 = True
        _is_composite = True

        def setUp(self):
            self.model_tester = ModelTester(sugar=SugarForConditionalGeneration in self.all_model_classes)

    class Sugar(Stock):
        all_model_classes = (SugarForConditionalGeneration,)
        additional_model_inputs = ["pixel_values", "slice_ids"]

    check(Stock, Sugar)


def test_processors(mixins):
    common = mixins("test_processing_common")
    processor = tiny.processor(chat_template=None)

    class Stock(common.ProcessorTesterMixin, unittest.TestCase):
        processor_class = LlavaProcessor

        @classmethod
        def _setup_image_processor(cls):
            return processor.image_processor

        @classmethod
        def _setup_tokenizer(cls):
            return processor.tokenizer

        @staticmethod
        def prepare_processor_dict():
            fields = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
            template = SugarProcessor.from_processor(tiny.processor()).chat_template
            return {"chat_template": template} | {name: getattr(processor, name) for name in fields}

    class Sugar(Stock):
        # of both classes, as `from_pretrained` makes it
        processor_class = type(SugarProcessor.from_processor(tiny.processor()))

    check(Stock, Sugar)
