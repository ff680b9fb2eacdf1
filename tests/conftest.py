import os


# The tests never reach for the Hub; read by huggingface_hub when it is imported, so set before anything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest  # noqa: E402
import saved_checkpoints  # noqa: E402
import tiny  # noqa: E402
import tiny_runs  # noqa: E402
import torch  # noqa: E402
from hub_server import HubServer  # noqa: E402

from hf_sugar import SugarProcessor, TripleEncoder  # noqa: E402


# Tiny models spend more time handing work between threads than computing.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hub_server():
    """A Hub on the loopback interface, see hub_server.py. `hub_server.environment` makes a new process use it."""
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server, tmp_path, monkeypatch):
    """The Hub of `hub_server`, used by this process too, with an empty cache."""
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as transformers_hub

    for name, value in hub_server.environment.items():
        monkeypatch.setenv(name, value)
    # read from the environment when huggingface_hub was imported
    template = hub_server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", hub_server.endpoint)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    return hub_server


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Directory of a LLaVA with its processor."""
    path = tmp_path_factory.mktemp("llava")
    tiny.llava().save_pretrained(path)
    tiny.processor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Directories of random teachers, as the `teachers` setting names them."""
    return tiny.teachers(tmp_path_factory.mktemp("teachers"))


@pytest.fixture
def make(backbone, teachers, tmp_path):
    """Makes a trainer: `tiny_runs.trainer` with settings in the place of a configuration."""
    of_trainer = {"lora", "peft_config", "eval_dataset", "processing_class", "callbacks"}

    def make(data=(tiny_runs.conversation,), model=backbone, path="run", **settings):
        kwargs = {name: settings.pop(name) for name in of_trainer & settings.keys()}
        args = tiny_runs.config(tmp_path / path, **{"teachers": teachers, **settings})
        return tiny_runs.trainer(model, args, data, **kwargs)

    return make


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Directories of random encoders, by `clip`, `siglip`, `dinov2` and `bert`."""
    root = tmp_path_factory.mktemp("teachers")
    return {
        kind: tiny.encoder(kind, root / kind, seed) for seed, kind in enumerate(("clip", "siglip", "dinov2", "bert"))
    }


@pytest.fixture(scope="session")
def encoder(checkpoints):
    paths = [checkpoints[kind] for kind in ("dinov2", "bert", "clip")]
    return TripleEncoder(*paths, device="cpu", batch_size=3)


@pytest.fixture(scope="session")
def clip_only(checkpoints):
    return TripleEncoder(None, None, checkpoints["clip"], device="cpu")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return saved_checkpoints.save_all(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="session")
def inputs(saved):
    return SugarProcessor.from_pretrained(saved / "full").embed_inputs(saved_checkpoints.items(saved))


@pytest.fixture(scope="session")
def plain(inputs):
    return {key: value for key, value in inputs.items() if key != "slice_ids"}
