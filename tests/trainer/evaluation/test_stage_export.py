"""The whole stage `export`: what is released, what proves it, what stops it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stagecoach_api.artifacts import CARD, REPORT, REPORT_TEXT, ModelCard
from stagecoach_api.kinds.export import ExportStage
from stagecoach_api.references import Reference
from stagecoach_trainer.generation.generation import Prompter
from stagecoach_trainer.models.load import load_folder, load_model
from stagecoach_trainer.models.save import save_model
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.stages import export as export_module
from stagecoach_trainer.stages.export import run
from stagecoach_trainer.text.vocabulary import load_tokenizer
from tests.trainer.evaluation.makers import QUESTIONS, chat_tokenizer, naive_answer, save_chat_adapter, save_chat_base
from tests.trainer.models.makers import FAMILIES, make_context, make_model, report_of, save_family

SAMPLES = {"prompts": list(QUESTIONS[:2]), "generation": {"maxNewTokens": 5}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with trained new rows over a base that it grows by two pieces."""
    root = tmp_path_factory.mktemp("adapter")
    return save_chat_adapter(root, base, root / "output", size=0.2)


def release(root: Path, model: Path, **config: Any) -> tuple[StageOutcome, StageContext]:
    context = make_context(root, "export", {"model": model})
    return run(ExportStage.model_validate({"model": {"uri": "model"}, **config}), context), context


def unmerged(root: Path, adapter: Path) -> Any:
    return load_model(make_context(root, inputs={"model": adapter}), Reference(uri="model"), merge=False).model.eval()


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def test_a_merged_release_in_fp32_computes_what_the_adapter_on_its_base_did(tmp_path: Path, adapter: Path) -> None:
    outcome, context = release(tmp_path / "run", adapter, precision="fp32", samples=SAMPLES)
    released, before = load_folder(context.output).eval(), unmerged(tmp_path / "before", adapter)
    ids = [*range(300, 330), 400, 401]  # the last two are new rows
    torch.testing.assert_close(logits_of(released, ids), logits_of(before, ids), atol=1e-4, rtol=1e-4)
    report = report_of(context)
    assert set(report["proof"]) == {"merge", "release"}
    assert outcome.metrics == {
        "proof.mergeKl": pytest.approx(0, abs=1e-6),
        "proof.releaseKl": pytest.approx(0, abs=1e-6),
    }
    assert report["proof"]["release"]["sameLikeliest"] > 0.99
    tokenizer = load_tokenizer(context.output)
    for sample, question in zip(report["samples"], QUESTIONS, strict=False):
        generated = naive_answer(before, Prompter(tokenizer).encode_question(question), 5, [tokenizer.eos_token_id])
        assert sample["answer"] == tokenizer.decode(generated, skip_special_tokens=True)
    assert ModelCard.model_validate_json((context.output / CARD).read_bytes()).adapter is False
    assert not (context.output / "adapter_config.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_another_family_is_released_and_answers(tmp_path: Path, family: str) -> None:
    folder = save_family(tmp_path / family, family, chat_tokenizer())
    outcome, context = release(tmp_path / "run", folder, precision="fp32", samples=SAMPLES)
    assert outcome.metrics == {"proof.releaseKl": 0.0}
    assert len(report_of(context)["samples"]) == 2
    assert AutoModelForCausalLM.from_pretrained(context.output).config.model_type == family


def test_rounding_to_bf16_is_counted_and_small(tmp_path: Path, adapter: Path) -> None:
    outcome, context = release(tmp_path, adapter)
    assert outcome.metrics["proof.mergeKl"] < 1e-6
    assert outcome.metrics["proof.mergeKl"] < outcome.metrics["proof.releaseKl"] < 1e-3
    weights = load_file(context.output / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((context.output / "config.json").read_text())["dtype"] == "bfloat16"
    text = (context.output / REPORT_TEXT).read_text(encoding="utf-8")
    assert "| merge |" in text
    assert "| release |" in text


def test_equal_exports_give_equal_bytes(tmp_path: Path, adapter: Path) -> None:
    outputs = [release(tmp_path / name, adapter, samples=SAMPLES)[1].output for name in ("one", "two")]
    files = [{path.name: path.read_bytes() for path in output.iterdir()} for output in outputs]
    assert files[0] == files[1]
    assert not any(str(tmp_path).encode() in content for content in files[0].values())


def test_a_large_model_is_cut_into_files_and_opens_again(tmp_path: Path, base: Path) -> None:
    model = make_model(400, hidden=256)
    folder = save_chat_base(tmp_path / "base")
    model.save_pretrained(folder)
    outcome, context = release(tmp_path, folder, precision="fp32", maxShardBytes=1 << 20)
    parts = sorted(path.name for path in context.output.glob("*.safetensors"))
    assert len(parts) > 3
    assert list(report_of(context)["weights"]) == parts
    assert max(report_of(context)["weights"].values()) < 1.1 * (1 << 20)
    assert outcome.metrics == {"proof.releaseKl": 0.0}


def settings_of(context: StageContext) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((context.output / "generation_config.json").read_text())
    return {key: value for key, value in settings.items() if key != "transformers_version"}


def test_the_generation_settings_of_the_base_are_released_and_none_of_ours(tmp_path: Path) -> None:
    """vLLM takes `max_new_tokens` as a limit of the server; transformers generates with the settings of the base."""
    folder = save_chat_base(tmp_path / "base")
    shipped = {
        "bos_token_id": 1,
        "eos_token_id": [7, 9],
        "pad_token_id": 3,
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": True,
        "repetition_penalty": 1.3,
    }
    (folder / "generation_config.json").write_text(json.dumps(shipped))
    _, context = release(tmp_path / "as it is", folder)
    assert settings_of(context) == {**shipped, "eos_token_id": [7, 9, 2]}
    _, context = release(tmp_path / "greedy", folder, generation={"temperature": 0, "maxNewTokens": 9})
    assert settings_of(context) == {
        "bos_token_id": 1,
        "do_sample": False,
        "eos_token_id": [7, 9, 2],
        "max_new_tokens": 9,
        "pad_token_id": 3,
        "repetition_penalty": 1.3,
    }
    _, context = release(tmp_path / "sampled", folder, generation={"temperature": 0.2})
    assert settings_of(context) == {**shipped, "eos_token_id": [7, 9, 2], "temperature": 0.2, "top_k": 0}


def test_a_base_without_generation_settings_gets_its_special_tokens_alone(tmp_path: Path, base: Path) -> None:
    _, context = release(tmp_path, base)
    assert set(settings_of(context)) <= {"_from_model_config", "bos_token_id", "eos_token_id", "use_cache"}
    assert settings_of(context)["eos_token_id"] == 2


def test_the_licence_of_the_base_goes_with_the_release(tmp_path: Path) -> None:
    folder = save_chat_base(tmp_path / "base")
    (folder / "LICENSE.txt").write_text("do as you like")
    (folder / "README.md").write_text("the base")
    _, context = release(tmp_path, folder)
    assert (context.output / "LICENSE.txt").read_text() == "do as you like"
    assert not (context.output / "README.md").exists()


# -- tied weights ------------------------------------------------------------------------------------------------------


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    _, context = release(tmp_path, save_chat_base(tmp_path / "base", tied=True), precision="fp32")
    assert "lm_head.weight" not in load_file(context.output / "model.safetensors")
    released = load_folder(context.output)
    assert released.get_output_embeddings().weight is released.get_input_embeddings().weight
    assert report_of(context)["notes"] == []


def test_weights_that_are_no_longer_tied_are_released_separately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_chat_base(tmp_path / "base", tied=True)
    whole = load_model

    def with_a_head_of_its_own(*arguments: Any, **settings: Any) -> Any:
        loaded = whole(*arguments, **settings)
        head = loaded.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach() * 1.5)
        return loaded

    monkeypatch.setattr(export_module, "load_model", with_a_head_of_its_own)
    outcome, context = release(tmp_path, folder, precision="fp32")
    assert json.loads((context.output / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(context.output / "model.safetensors")
    assert "released apart" in report_of(context)["notes"][0]
    assert outcome.metrics["proof.releaseKl"] < 1e-9


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA over the base as it is."""
    root = tmp_path_factory.mktemp("plain")
    return save_chat_adapter(root, base, root / "output", grown=False, size=0.2)


@pytest.fixture(scope="module")
def over_plain(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA over a plain LoRA."""
    root = tmp_path_factory.mktemp("over")
    return save_chat_adapter(root, plain, root / "output", grown=False, size=0.15)


@pytest.fixture(scope="module")
def over_grown(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA over one with trained rows."""
    root = tmp_path_factory.mktemp("over-grown")
    return save_chat_adapter(root, adapter, root / "output", grown=False, size=0.15)


def opened_by_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open an adapter as its folder prescribes, without this program."""
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(folder)
    return AutoPeftModelForCausalLM.from_pretrained(".").eval()


IDS = [*range(300, 330), 1, 2]


@pytest.mark.parametrize("name", ["plain", "over_plain", "adapter", "over_grown"])
def test_an_adapter_is_released_so_that_plain_peft_computes_what_it_computed_here(
    tmp_path: Path, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter over an adapter was released without the lower one: plain PEFT opened it and answered wrongly."""
    made: Path = request.getfixturevalue(name)
    outcome, context = release(tmp_path / "run", made, mergeAdapters=False, precision="fp32", samples=SAMPLES)
    assert outcome.metrics["proof.releaseKl"] < 1e-7
    expected = logits_of(unmerged(tmp_path / "before", made), IDS)
    torch.testing.assert_close(logits_of(opened_by_peft(context.output, monkeypatch), IDS), expected, atol=2e-5, rtol=0)
    (tmp_path / "alone").mkdir()
    again = load_model(make_context(tmp_path / "alone", inputs={"model": context.output}), Reference(uri="model"))
    torch.testing.assert_close(logits_of(again.model, IDS), expected, atol=2e-5, rtol=0)
    for file in context.output.rglob("*"):
        assert not file.is_file() or str(tmp_path.parent).encode() not in file.read_bytes(), file


def test_an_adapter_names_the_base_that_the_user_names(
    tmp_path: Path, base: Path, over_plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(base)
    _, context = release(tmp_path, over_plain, mergeAdapters=False, baseModel="models/tiny")
    config = json.loads((context.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/tiny"
    assert config["r"] == 16
    assert not (context.output / "base").exists()
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    opened = AutoPeftModelForCausalLM.from_pretrained(context.output).eval()
    expected = logits_of(unmerged(tmp_path / "before", over_plain), IDS)
    torch.testing.assert_close(logits_of(opened, IDS), expected, atol=2e-5, rtol=0)
    assert "2 adapters as one; its base is models/tiny" in report_of(context)["notes"][0]


def test_a_base_that_exists_nowhere_has_no_name(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match=r"baseModel: the adapter was not trained on org/model .* rows were added"):
        release(tmp_path, adapter, mergeAdapters=False, baseModel="org/model")


def test_a_whole_model_cannot_be_released_as_an_adapter(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="uri:model is not an adapter"):
        release(tmp_path, base, mergeAdapters=False)


# -- what is not released ----------------------------------------------------------------------------------------------


def change_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_a_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_the_vocabulary(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = state["model"]["vocab"]
    pieces["<0x41>"], pieces["<0x42>"] = pieces["<0x42>"], pieces["<0x41>"]
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(change_a_weight, "proof: the release in fp32 changed the model: mean KL", id="another weight"),
        pytest.param(lose_a_weight, "missing weights", id="a lost weight"),
        pytest.param(change_a_shape, "(mismatch|shape)", id="another shape"),
        pytest.param(write_nan, "logits of the released model are NaN or infinite", id="a NaN weight"),
        pytest.param(change_the_vocabulary, "released vocabulary differs", id="another vocabulary"),
    ],
)
def test_what_was_written_wrong_is_found_when_it_is_read_back(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
) -> None:
    sound = save_model

    def save_and_damage(model: Any, tokenizer: Any, vocabulary: Path, output: Path, *rest: Any, **more: Any) -> None:
        sound(model, tokenizer, vocabulary, output, *rest, **more)
        damage(output)

    monkeypatch.setattr(export_module, "save_model", save_and_damage)
    with pytest.raises(UserError, match=message):
        release(tmp_path, base, precision="fp32")
    assert not (tmp_path / "work" / "output" / REPORT).exists()


def test_a_merge_that_changes_the_model_is_found(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(UserError, match="merging the adapters changed the model: mean KL"):
        release(tmp_path, adapter, proof={"maxKl": 10})


def test_a_limit_that_rounding_breaks_stops_the_release(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match=r"the release in bf16 changed the model.*allowed are 1e-12"):
        release(tmp_path, base, proof={"maxKl": 1e-12})


def test_a_model_that_is_broken_already_is_not_released(tmp_path: Path) -> None:
    folder = save_chat_base(tmp_path / "base")
    write_nan(folder)
    with pytest.raises(UserError, match="logits of the model before its release are NaN or infinite"):
        release(tmp_path, folder)


def test_a_chat_template_that_does_not_render_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="chatTemplate: the chat template cannot render"):
        release(tmp_path, base, chatTemplate="{{ messages[0]['content'] | nosuchfilter }}")


# -- somewhere else ----------------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("stagecoach"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
messages = [{"role": "user", "content": question}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
generated = model.generate(**prompt)[0, prompt["input_ids"].shape[1]:]
print(json.dumps({
    "text": tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
    "answer": tokenizer.decode(generated, skip_special_tokens=True),
    "stagecoach": [name for name in sys.modules if name.startswith("stagecoach")],
}))
"""


def test_the_release_opens_in_plain_transformers_in_another_process_and_answers_alike(
    tmp_path: Path, adapter: Path
) -> None:
    template = (
        "{% for m in messages %}<human>:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<bot>:{% endif %}"
    )
    _, context = release(
        tmp_path, adapter, precision="fp32", samples=SAMPLES, generation={"maxNewTokens": 5}, chatTemplate=template
    )
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(context.output), QUESTIONS[0]],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found == {
        "text": f"<human>:{QUESTIONS[0]}\n<bot>:",
        "answer": report_of(context)["samples"][0]["answer"],
        "stagecoach": [],
    }
    assert found["answer"]
