"""Push, list, load by revision and fail, over real HTTP against the Hub of hub_server.py."""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from tiny_runs import caption, config, conversation, rows, trainer

from hf_sugar import SugarForConditionalGeneration, SugarProcessor, SugarTrainingConfig, models
from hf_sugar.cli.checkpoint import CheckpointArguments
from hf_sugar.cli.main import main
from hf_sugar.hub import model_card
from hf_sugar.hub.card import RUN_FILE, SETTINGS


# Whatever of this machine could be in a file: where the tests and their files are, who runs them, the token.
USER = "jane-roe"
SECRETS = [str(Path.home()), tempfile.gettempdir() + os.sep, str(Path(__file__).parents[1]), USER, HubServer.token]
CODE = {file.name for file in Path(models.__file__).parent.glob("*_sugar.py")}
MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
PROCESSOR = {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}


def secrets_in(content: bytes) -> list[str]:
    return [secret for secret in SECRETS if secret.encode() in content]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A plain LLaVA and a teacher that state their licences, and what full and adapter training leave behind."""
    path = tmp_path_factory.mktemp(f"home-of-{USER}")
    tiny.llava().save_pretrained(path / "llava")
    tiny.processor().save_pretrained(path / "llava")
    (path / "llava" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A LLaVA\n")
    teachers = tiny.teachers(path / "teachers")
    (path / "teachers" / "cross" / "README.md").write_text("---\nlicense: mit\n---\n# A CLIP\n")
    for name, peft_config in (("full", None), ("lora", LoraConfig(r=4))):
        settings = dict(max_steps=2, save_strategy="steps", save_steps=2, hub_token=HubServer.token)
        args, data = config(path / name, teachers, **settings), rows([conversation, caption], 8)
        run = trainer(str(path / "llava"), args, data, peft_config=peft_config)
        run.dataset_names = [str(path / "captions.parquet"), "org/stories"]
        run.train()
        run.save_model()
    return path


@pytest.fixture
def backbone(hub, place):
    """The plain LLaVA, on the Hub."""
    HfApi().create_repo("me/llava", exist_ok=True)
    HfApi().upload_folder(repo_id="me/llava", folder_path=place / "llava")
    return "me/llava"


@pytest.fixture(scope="module")
def items(place):
    tiny.image(3).save(place / "photo.jpg")
    return ["a red circle", place / "photo.jpg", [place / "photo.jpg", "what is this?"]]


@torch.no_grad()
def embed(name, items, **kwargs):
    model = SugarForConditionalGeneration.from_pretrained(name, **kwargs)
    return model.embed(**SugarProcessor.from_pretrained(name, **kwargs).embed_inputs(items))


def pushed(hub, repo_id, revision="main") -> dict[str, bytes]:
    """Files of a repository, none of which gives anything of this machine away."""
    files = hub.files(repo_id, revision)
    assert {name: secrets_in(content) for name, content in files.items() if secrets_in(content)} == {}
    return files


def metadata(files, tmp_path) -> dict:
    (tmp_path / "card.md").write_bytes(files["README.md"])
    return metadata_load(tmp_path / "card.md")


class TestPush:
    def test_full_checkpoint(self, hub, place, items, tmp_path):
        main(["push", str(place / "full"), "--repo_id", "full", "--private"])
        files = pushed(hub, "me/full")
        assert set(files) == MODEL | CODE | PROCESSOR | {RUN_FILE}
        # the token and the paths are there to be found in what stayed behind
        assert set(secrets_in((place / "full" / "training_args.bin").read_bytes())) >= {USER, HubServer.token}

        info = HfApi().model_info("me/full")
        assert info.private and info.pipeline_tag == "image-text-to-text" and info.library_name == "transformers"
        assert {s.rfilename for s in info.siblings} == set(HfApi().list_repo_files("me/full")) == set(files)
        assert torch.equal(embed("me/full", items), embed(place / "full", items))

    def test_every_part_of_the_run_is_in_the_card(self, hub, place, tmp_path):
        main(["push", str(place / "full"), "--repo_id", "card", "--license", "cc-by-4.0", "--base_model", "org/llava"])
        files = pushed(hub, "me/card")
        data = metadata(files, tmp_path)
        assert data["license"] == "cc-by-4.0" and data["datasets"] == ["org/stories"]
        assert data["base_model"] == "org/llava" and data["base_model_relation"] == "finetune"
        assert {"hf_sugar", "sugar"} <= set(data["tags"])
        text = files["README.md"].decode()
        for expected in (
            "| `structure_weight` | 0.01 |",
            "| `delta` | 1.0 |",
            "| `learning_rate` | 0.01 |",
            "| data | captions.parquet, org/stories; 8 rows |",
            "| cross teacher | cross; licence mit |",
            "| text teacher | text; licence not stated |",
            "| steps | 2, on 1 process |",
            'SugarForConditionalGeneration.from_pretrained("me/card")',
            "2411.00304",
            "hf-sugar evaluate",
        ):
            assert expected in text
        ModelCard(text).validate()

    def test_adapter(self, hub, backbone, place, items, tmp_path):
        main(["push", str(place / "lora"), "--repo_id", "me/lora", "--base_model", backbone])
        files = pushed(hub, "me/lora")
        assert set(files) == {"README.md", "config.json", RUN_FILE} | ADAPTER | CODE | PROCESSOR
        commit = HfApi().model_info(backbone).sha
        stored = json.loads(files["config.json"])
        assert (stored["backbone_name_or_path"], stored["backbone_revision"]) == (backbone, commit)
        stored = json.loads(files["adapter/adapter_config.json"])
        assert (stored["base_model_name_or_path"], stored["revision"]) == (backbone, commit)
        data = metadata(files, tmp_path)
        assert (data["base_model"], data["base_model_relation"]) == (backbone, "adapter")
        assert data["license"] == "apache-2.0"
        assert torch.equal(embed("me/lora", items), embed(place / "lora", items))

    def test_branch_and_pull_request(self, hub, place):
        main(["push", str(place / "full"), "--repo_id", "branches"])
        main(["push", str(place / "full"), "--repo_id", "branches", "--revision", "try", "--license", "mit"])
        main(["push", str(place / "full"), "--repo_id", "branches", "--create_pr", "--license", "bsd-3-clause"])
        licenses = {"main": "apache-2.0", "try": "mit", "refs/pr/1": "bsd-3-clause"}
        assert hub.repositories["me/branches"].branches.keys() == licenses.keys()
        for revision, license in licenses.items():
            assert ModelCard(hub.files("me/branches", revision)["README.md"].decode()).data.license == license

    def test_a_card_written_by_hand_stays(self, hub, place, tmp_path):
        for name in ("config.json", "model.safetensors", "processor_config.json"):
            (tmp_path / name).symlink_to(place / "full" / name)
        for text, stays in (
            ("# Mine\n", True),
            ("It has been trained using [TRL](https://github.com/huggingface/trl).\n", False),
        ):
            (tmp_path / "README.md").write_text(text)
            main(["push", str(tmp_path), "--repo_id", "mine"])
            assert (hub.files("me/mine")["README.md"].decode() == text) == stays

    def test_refuses_what_is_not_a_sugar_checkpoint(self, hub, place, tmp_path):
        before = len(hub.requests)
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "config.json").write_bytes((place / "full" / "config.json").read_bytes())
        for arguments, message in (
            ([place / "llava", "--repo_id", "x"], "plain 'llava' model"),
            ([tmp_path, "--repo_id", "x"], "has no config.json"),
            ([tmp_path / "nothing", "--repo_id", "x"], "is not a directory"),
            ([place / "full"], "`repo_id` is not set"),
            ([tmp_path / "half", "--repo_id", "x"], "lacks model.safetensors, processor_config.json"),
            # nobody else could load it
            ([place / "lora", "--repo_id", "x"], "local directory 'llava'.*--base_model"),
        ):
            with pytest.raises(ValueError, match=message):
                main(["push", *map(str, arguments)])
        assert len(hub.requests) == before

    def test_trainer(self, hub, backbone, make, tmp_path):
        settings = dict(push_to_hub=True, hub_model_id="trained", hub_private_repo=True, hub_token=HubServer.token)
        settings |= dict(max_steps=1, save_strategy="steps", save_steps=1)
        trainer = make(rows([conversation], 4), backbone, "out", lora=True, **settings)
        trainer.train()
        saved = pushed(hub, "me/trained")
        *_, last = hub.repositories["me/trained"].commits.values()
        assert last.title == "Training in progress, step 1"
        (tmp_path / "out" / ".env").write_text("SECRET=1")
        trainer.push_to_hub(tags=["mine"])
        files = pushed(hub, "me/trained")
        assert {name for name in files if "/" in name} == ADAPTER
        assert set(files) == set(saved) and ".env" not in files and "training_args.bin" not in files
        assert json.loads(files["config.json"])["backbone_revision"] == HfApi().model_info(backbone).sha
        data = metadata(files, tmp_path)
        # the licence is asked of the Hub
        assert data["base_model"] == backbone and data["license"] == "apache-2.0" and "mine" in data["tags"]
        assert HfApi().model_info("me/trained").private
        commit = trainer.push_to_hub(blocking=False, tags=["other"]).result(30)
        assert commit.oid == HfApi().model_info("me/trained").sha

    def test_trainer_says_before_training_what_cannot_be_pushed(self, hub, place, make):
        settings = dict(model=str(place / "llava"), structure_weight=0.0, push_to_hub=True)
        with pytest.raises(ValueError, match="llava is not on the Hub"):
            make(lora=True, **settings)
        with pytest.raises(ValueError, match="all_checkpoints.*publishes"):
            make(hub_strategy="all_checkpoints", **settings)

    def test_what_was_trained_is_known_of_a_repository(self, hub, backbone, place, make, tmp_path):
        """A projector that nobody trained is random, on the Hub as on the machine where it was not trained."""
        trainer = make(rows([conversation], 4), backbone, "sft", lora=True, structure_weight=0.0, max_steps=1)
        trainer.train()
        trainer.save_model()
        main(["push", str(tmp_path / "sft"), "--repo_id", "me/sft"])
        main(["push", str(place / "full"), "--repo_id", "me/sugar"])
        sft, sugar, plain = map(CheckpointArguments, ("me/sft", "me/sugar", backbone))
        assert sft.untrained_projector().startswith("`random_projector` is true in its config.json")
        assert sugar.untrained_projector() is None and sugar.training_settings()["delta"] == 1.0
        goes_on = make(rows([conversation], 4), str(place / "full"), "on", structure_weight=0.0)
        assert not goes_on.model.config.random_projector
        assert "plain 'llava' model" in plain.untrained_projector() and plain.training_settings() == {}

    def test_model(self, hub, backbone, place, items, tmp_path):
        model = SugarForConditionalGeneration.from_pretrained(place / "full")
        model.push_to_hub("me/model")
        SugarProcessor.from_pretrained(place / "full").push_to_hub("me/model")
        files = pushed(hub, "me/model")
        assert set(files) == MODEL | CODE | PROCESSOR
        assert ModelCard(files["README.md"].decode()).data.pipeline_tag == "image-text-to-text"
        assert torch.equal(embed("me/model", items), embed(place / "full", items))
        # a card that is there already is left alone, but for tags
        HfApi().upload_file(repo_id="me/model", path_in_repo="README.md", path_or_fileobj=b"# By hand\n")
        model.push_to_hub("me/model")
        assert "# By hand" in hub.files("me/model")["README.md"].decode()

        model = SugarForConditionalGeneration.from_pretrained(backbone, retrieval_dim=16)
        model.push_to_hub("me/untrained")
        assert metadata(pushed(hub, "me/untrained"), tmp_path)["base_model"] == backbone

        with pytest.raises(ValueError, match="nobody else has"):
            SugarForConditionalGeneration.from_pretrained(place / "lora").push_to_hub("me/local")

    def test_failed(self, hub, place, monkeypatch):
        """What the Hub refuses leaves the repository as it was, and says why."""
        main(["push", str(place / "full"), "--repo_id", "failed", "--private"])
        before = HfApi().model_info("me/failed").sha
        with monkeypatch.context() as patch, pytest.raises(HfHubHTTPError, match="401"):
            patch.setattr(hub, "token", "hf_another")
            main(["push", str(place / "full"), "--repo_id", "me/failed", "--license", "mit"])
        assert HfApi().model_info("me/failed").sha == before
        with pytest.raises(OSError, match="me/failed"):
            SugarForConditionalGeneration.from_pretrained("me/failed", token=False)


class TestLoad:
    def test_snippets_of_the_cards(self, hub, backbone, place, tmp_path, monkeypatch):
        """Both of each card. (test_remote_code.py loads such files where hf_sugar is not.)"""
        monkeypatch.chdir(tmp_path)
        tiny.image(3).save("photo.jpg")
        for name, arguments in (("full", []), ("lora", ["--base_model", backbone])):
            main(["push", str(place / name), "--repo_id", f"snippet-{name}", *arguments])
            card = hub.files(f"me/snippet-{name}")["README.md"].decode()
            snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
            assert len(snippets) == 2
            expected = embed(place / name, ["a red circle", Path("photo.jpg")])
            for snippet in snippets:
                exec(snippet, names := {})
                torch.testing.assert_close(names["embeddings"][:2], expected, rtol=0, atol=1e-6)

    def test_revision(self, hub, place, items, tmp_path):
        main(["push", str(place / "full"), "--repo_id", "revisions"])
        first = HfApi().model_info("me/revisions").sha
        model = SugarForConditionalGeneration.from_pretrained(place / "full")
        with torch.no_grad():
            model.retrieval_projector.linear_2.weight.neg_()
        model.push_to_hub("me/revisions")
        old, new = embed("me/revisions", items, revision=first), embed("me/revisions", items)
        assert torch.equal(old, embed(place / "full", items)) and torch.equal(new, -old)


class TestCard:
    def test_example(self, hub):
        card = ModelCard.load(Path(__file__).parents[1] / "model_cards" / "sugar-world.md")
        card.validate()
        assert not secrets_in(str(card).encode())
        assert card.data.library_name == "transformers" and card.data.eval_results

    def test_figures_of_the_report(self, hub, place, tmp_path):
        for name in ("config.json", "sugar_run.json"):
            (tmp_path / name).write_bytes((place / "full" / name).read_bytes())
        figure = {"value": 41.25, "low": 30.0, "high": 52.5, "n": 12}
        labels = {"seen/image_to_text_recall@1": {**figure, "value": 96.5}}
        report = {
            "runs": {
                "labels": labels,
                "trained": {"seen/image_to_text_recall@1": figure, "exact_match": figure, "pairs": 12},
            },
            "settings": {
                "image_text_data": {"seen": f"/home/{USER}/captions.parquet"},
                "generation_data": ["org/questions"],
                "split": "test",
            },
        }
        (tmp_path / "report.json").write_text(json.dumps(report))
        card = model_card(tmp_path, "me/measured")
        card.validate()
        assert not secrets_in(str(card).encode())
        results = {(r.dataset_name, r.metric_type, r.metric_value) for r in ModelCard(str(card)).data.eval_results}
        measured = {("captions.parquet", "image_to_text_recall@1"), ("org/questions", "exact_match")}
        assert results == {(*names, 41.25) for names in measured}
        text = str(card)
        assert "| seen: image to text R@1 | 96.5 [30.0, 52.5] | 41.2 [30.0, 52.5] |" in text
        assert "over the queries. `labels` are the similarities of the teachers" in text
        assert "hf-sugar evaluate --config evaluate.yaml --model_name_or_path me/measured" in text
        assert "seen: captions.parquet" in text

    def test_of_a_random_projector_it_says_that_embeddings_mean_nothing(self, place, tmp_path):
        config = json.loads((place / "full" / "config.json").read_text())
        assert "the embeddings mean nothing" not in str(model_card(place / "full"))
        (tmp_path / "config.json").write_text(json.dumps({**config, "random_projector": True}))
        assert "the embeddings mean nothing" in str(model_card(tmp_path))

    def test_settings_of_the_loss(self, place):
        """All of them, but those that say what the model is, where teachers run and what is refused or only measured."""
        others = {
            name for name in SugarTrainingConfig.__annotations__ if name.startswith(("teacher", "retrieval", "_"))
        }
        others |= {"image_pooling", "allow_single_sample", "eval_retrieval_rows", "load_in_4bit", "on_bad_row"}
        assert set(SugarTrainingConfig.__annotations__) - others <= set(SETTINGS)
        settings = json.loads((place / "full" / "sugar_run.json").read_text())["settings"]
        assert settings["discriminative_loss"] == "both" and "matrix_batch_size" not in settings

    def test_of_a_directory_without_a_record(self, place, tmp_path):
        (tmp_path / "config.json").write_bytes((place / "full" / "config.json").read_bytes())
        text = str(model_card(tmp_path))
        assert "How this checkpoint was trained is not recorded. Base model: not named; licence not stated." in text
