"""Masked language models in transformers' format: a tiny random BERT, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny_bert
import torch
from tiny_bert import WORDS, save_tokenizer

from tasks import registry
from tasks.recipe import Recipe
from tasks.run import generate


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_bert.save(tmp_path_factory.mktemp("bert"))


def recipe_of(folder, **model):
    spec = {"name": "masked_lm", "path": str(folder), "length": 6} | model
    recipe = Recipe(spec, {"name": "ancestral"}, {"name": "uniform", "num_steps": 3}, {"name": "none"},
                    {"name": "single"}, batch_size=8)  # fmt: skip
    return recipe.completed()


def test_states_number_the_real_tokens_and_the_mask_comes_last(saved):
    spec = recipe_of(saved).parts.model
    assert spec.noising.vocabulary == 5 and spec.shape == (6,) and spec.stored_vocabulary == len(WORDS)
    model = spec.load("cpu")
    ids = model.decode(torch.arange(6)[None])
    assert [WORDS[i] for i in ids[0]] == ["a", "b", "c", "d", "e", "[MASK]"]
    assert torch.equal(model.encode(ids), torch.arange(6)[None])
    assert model.texts(ids[:, :3]) == ["a b c"]
    with pytest.raises(ValueError, match=r"token 0 \('\[PAD\]'\) is special and no state"):
        model.encode(torch.zeros(1, 2, dtype=torch.int64))


def test_its_answer_is_the_networks_over_the_real_tokens(saved):
    from transformers import BertForMaskedLM

    model = recipe_of(saved).parts.model.load("cpu")
    x = torch.tensor([[5, 0, 5, 4, 1, 5], [5, 5, 5, 5, 5, 5]])
    found = model.denoise(x, 0.5)
    network = BertForMaskedLM.from_pretrained(saved).eval()
    ids = torch.tensor([[WORDS.index(w) for w in ("[CLS]", *row, "[SEP]")] for row in (
        ("[MASK]", "a", "[MASK]", "e", "b", "[MASK]"), ("[MASK]",) * 6)])  # fmt: skip
    with torch.no_grad():
        logits = network(ids).logits[:, 1:-1, [WORDS.index(w) for w in "abcde"]].double()
    masked = x == 5
    torch.testing.assert_close(found[masked], logits.softmax(-1)[masked], rtol=1e-5, atol=1e-7)
    assert torch.equal(found[~masked], torch.nn.functional.one_hot(x[~masked], 5).double())
    # The context matters: the same place among other tokens is answered otherwise.
    assert not torch.allclose(found[0, 0], found[1, 0], atol=1e-3)


def test_it_samples_tokens_that_are_never_special(saved):
    recipe = recipe_of(saved)
    recipe.check()
    rows = generate(recipe, 0, 16)
    assert rows["x0"].shape == (16, 6) and rows["x0"].dtype == np.int64
    assert {WORDS[i] for i in rows["x0"].ravel()} <= set("abcde")
    registry.metrics.build("token_entropy").check(recipe.parts.model, 16)


def test_the_revision_follows_weights_and_tokenizer(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    first = recipe_of(saved)
    assert recipe_of(copy).key == first.key  # where it lies says nothing
    assert len(first.parts.model.revision) == 40
    save_tokenizer(copy, [*WORDS[:-1], "z"], mask_token="[MASK]")
    assert recipe_of(copy).key != first.key
    with pytest.raises(ValueError, match="but model.revision is"):
        recipe_of(copy, revision=first.parts.model.revision)


def test_what_is_no_masked_language_model_is_refused_when_planning(saved, tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertModel

    def copy(name):
        return shutil.copytree(saved, tmp_path / name)

    folder = copy("tokenizer")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    save_tokenizer(folder)
    with pytest.raises(ValueError, match="has no mask token.*add_special_tokens"):
        recipe_of(folder).check()
    folder = copy("large")
    save_tokenizer(folder, [*WORDS, "f"], mask_token="[MASK]")
    with pytest.raises(ValueError, match="has 11 tokens, but the model knows 10"):
        recipe_of(folder).check()
    folder = copy("small")
    BertForMaskedLM(BertConfig.from_pretrained(saved, vocab_size=30)).save_pretrained(folder)
    with pytest.raises(ValueError, match="has 10 tokens, but its network was trained with 30, so texts would not"):
        recipe_of(folder).check()
    folder = copy("body")
    config = BertConfig.from_pretrained(saved)
    BertModel(config).save_pretrained(folder)
    with pytest.raises(ValueError, match="holds BertModel, not a model for masked language modelling"):
        recipe_of(folder).check()
    with pytest.raises(ValueError, match="length must be at most 8 .* which knows 10 places, got 9"):
        recipe_of(saved, length=9).check()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no config.json with safetensors weights.*pickled weights are not loaded"):
        recipe_of(folder)
    damaged = copy("damaged")
    (damaged / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read as a masked language model"):
        recipe_of(damaged).parts.model.load("cpu")


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0" * 39, "G" * 40])
def test_a_hub_model_needs_a_full_commit(revision):
    with pytest.raises(ValueError, match="must be the full commit, 40 hexadecimal digits"):
        registry.models.build({"name": "masked_lm", "path": "owner/name", "revision": revision})


@pytest.mark.parametrize("path", ["/no/such/folder", "a/b/c", "./x"])
def test_what_is_neither_folder_nor_hub_id_is_refused(path):
    with pytest.raises(ValueError, match="neither a folder nor the id of a hub model"):
        registry.models.build({"name": "masked_lm", "path": path, "revision": "0" * 40})
