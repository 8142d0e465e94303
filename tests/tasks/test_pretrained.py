"""Rewards and features of pretrained networks: definitions on tiny models of the same classes, and missing weights."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_weights
import torch
from PIL import Image

from tasks import blip_tower, clip_tower, registry
from tasks.pictures import CLIP_MEAN, CLIP_STD, Preparation
from tasks.pretrained import from_folder, home
from tasks.recipe import scorer_identity

REWARDS = ["clip_score", "pick_score", "hps_v2", "image_reward", "aesthetic", "vqa_yes"]
PROMPTED = [name for name in REWARDS if name != "aesthetic"]
FEATURES = ["clip", "dinov2"]
SAMPLES = torch.rand(7, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(kind, name, **fields):
    return registry.ALL[kind].build({"name": name} | tiny_weights.fields(kind, name) | fields)


def scores(name, samples, first=0, **fields):
    reward = build("reward", name, **fields)
    scorer = reward.at(torch.arange(first, first + len(samples))) if name in PROMPTED else reward
    with torch.no_grad():
        return scorer(samples, None)


# --- every reward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_a_score_depends_on_neither_the_batch_nor_the_place_in_it(name):
    whole = scores(name, SAMPLES)
    single = torch.cat([scores(name, SAMPLES[i : i + 1], first=i) for i in range(7)])
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-5)
    pairs = torch.cat([scores(name, SAMPLES[i : i + 2], first=i) for i in range(0, 7, 2)])
    torch.testing.assert_close(pairs, whole, rtol=1e-4, atol=1e-5)
    assert whole.std() > 1e-4


@pytest.mark.parametrize("name", PROMPTED)
def test_row_i_has_prompt_i_over_again_after_the_last(name):
    same = SAMPLES[:1].expand(7, -1, -1, -1)
    values = scores(name, same)
    torch.testing.assert_close(values[3:6], values[:3], rtol=1e-4, atol=1e-5)
    assert len({round(v, 5) for v in values[:3].tolist()}) > 1
    one = scores(name, same[:1], prompts=[tiny_weights.PROMPTS[1]])
    torch.testing.assert_close(one[0], values[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PROMPTED)
def test_a_reward_without_prompts_or_rows_is_refused(name):
    with pytest.raises(ValueError, match=f"reward {name} compares a picture with its prompt"):
        build("reward", name, prompts=[]).check((3, 32, 32))
    with pytest.raises(ValueError, match="without their rows"):
        build("reward", name)(SAMPLES, None)


@pytest.mark.parametrize(("kind", "name"), [*(("reward", n) for n in REWARDS), *(("features", n) for n in FEATURES)])
def test_missing_weights_say_what_to_fetch_and_where_to_put_it(kind, name, tmp_path, monkeypatch):
    monkeypatch.setenv("SOLVUS_WEIGHTS", str(tmp_path / "weights"))
    assert home() == tmp_path / "weights"
    prompts = {"prompts": ["a cat"]} if name in PROMPTED else {}
    made = registry.ALL[kind].build({"name": name} | prompts)
    with pytest.raises(
        ValueError, match=rf"{kind} {name} has no weights: {tmp_path}/weights/.* Fetch .* from"
    ) as caught:
        made.check((3, 28, 28))
    assert f"set {kind}.path" in str(caught.value)
    with pytest.raises(ValueError, match="has no weights"):
        _ = made.revision


@pytest.mark.parametrize(("kind", "name"), [*(("reward", n) for n in REWARDS), *(("features", n) for n in FEATURES)])
def test_what_is_no_picture_is_refused(kind, name):
    with pytest.raises(ValueError, match=r"reads pictures .* but the model makes \(2,\)"):
        build(kind, name).check((2,))
    build(kind, name).check((1, 8, 8))


def test_a_hub_id_needs_a_pinned_commit():
    with pytest.raises(ValueError, match="is no folder. If it is a hub id, set reward.pinned to the commit"):
        build("reward", "aesthetic", path="openai/clip", pinned="main").check((3, 8, 8))


def test_a_hub_that_does_not_answer_is_an_error_that_says_what_to_do(monkeypatch):
    import huggingface_hub

    def fail(*arguments, **more):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="the hub cannot be reached .no network.. Download it where there is a"):
        build("reward", "aesthetic", path="openai/clip", pinned="0" * 40).check((3, 8, 8))


def test_a_gated_hub_id_says_how_to_be_let_in(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    class Gated(GatedRepoError):
        def __init__(self):
            Exception.__init__(self, "gated")

    def fail(*arguments, **more):
        raise Gated

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = (
        "reward aesthetic: owner/gated@0.* is gated: .*https://huggingface.co/owner/gated, then run `hf auth login`"
    )
    with pytest.raises(ValueError, match=message):
        build("reward", "aesthetic", path="owner/gated", pinned="0" * 40).check((3, 8, 8))


def test_of_a_hub_id_only_the_weights_that_are_read_are_fetched(monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = (
        "config.json model.safetensors pytorch_model.bin tf_model.h5 flax_model.msgpack merges.txt vocab.json".split()
    )
    asked = []

    def download(*arguments, allow_patterns, **more):
        asked.extend(filter_repo_objects(files, allow_patterns=allow_patterns))
        return str(tiny_weights.clip())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    build("reward", "clip_score", path="owner/clip", pinned="1" * 40).check((3, 8, 8))
    assert asked == ["config.json", "model.safetensors", "merges.txt", "vocab.json"]


def test_the_key_is_the_hash_of_weights_and_settings_and_not_their_place(tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_weights.clip(), moved)
    spec = registry.rewards.complete({"name": "clip_score"} | tiny_weights.fields("reward", "clip_score"))
    assert scorer_identity(spec | {"path": str(moved)}) == scorer_identity(spec)
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"changed": True}))
    assert scorer_identity(spec | {"path": str(moved)}) != scorer_identity(spec)
    other = scorer_identity(spec | {"path": str(tiny_weights.clip(1))})
    assert other != scorer_identity(spec)


def test_weights_that_are_not_whole_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "part"
    shutil.copytree(tiny_weights.dinov2(), folder)
    state = load_file(folder / "model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is no whole Dinov2Model: layernorm.weight"):
        build("features", "dinov2", path=str(folder))(SAMPLES, None)


@pytest.mark.parametrize(("kind", "name"), [*(("reward", n) for n in REWARDS), *(("features", n) for n in FEATURES)])
def test_weights_that_were_cut_short_are_refused_when_planning(kind, name, tmp_path):
    fields = tiny_weights.fields(kind, name)
    for file in (p for p in Path(fields["path"]).iterdir() if p.suffix in (".safetensors", ".pt", ".pth")):
        shutil.copytree(fields["path"], tmp_path / file.name)
        (tmp_path / file.name / file.name).write_bytes(file.read_bytes()[:-20])
        with pytest.raises(ValueError, match=rf"{re.escape(file.name)} is damaged \(\d+ bytes\): .* Fetch .* again"):
            build(kind, name, path=str(tmp_path / file.name)).check((3, 28, 28))


def test_inception_weights_that_were_cut_short_are_refused_when_planning(tmp_path):
    (tmp_path / "it.pth").write_bytes(tiny_weights.inception().read_bytes()[:-20])
    extractor = build("features", "inception_v3", path=str(tmp_path / "it.pth"))
    with pytest.raises(ValueError, match="it.pth is damaged .* Fetch https"):
        extractor.check((3, 28, 28))


@pytest.mark.parametrize(("kind", "name"), [*(("reward", n) for n in REWARDS), *(("features", n) for n in FEATURES)])
def test_a_folder_of_another_model_is_refused_when_planning(kind, name, tmp_path):
    shutil.copytree(tiny_weights.fields(kind, name)["path"], tmp_path / "it")
    other = tiny_weights.clip() if name == "dinov2" else tiny_weights.dinov2()
    shutil.copy(other / "config.json", tmp_path / "it")
    message = (
        f"{kind} {name} needs a model of type '.*', but {tmp_path}/it/config.json describes one of type '.*'. Fetch"
    )
    with pytest.raises(ValueError, match=message):
        build(kind, name, path=str(tmp_path / "it")).check((3, 28, 28))


def test_weights_that_are_damaged_after_planning_are_an_error_that_says_what_to_do(tmp_path):
    from transformers import Dinov2Model

    shutil.copytree(tiny_weights.dinov2(), tmp_path / "it")
    (tmp_path / "it" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(
        ValueError, match="it cannot be loaded as a Dinov2Model: Error while deserializing header.* Fetch it"
    ):
        from_folder(Dinov2Model, tmp_path / "it", "cpu")


@pytest.mark.parametrize("name", PROMPTED)
def test_a_reward_without_its_tokenizer_is_refused_when_planning(name, tmp_path):
    """transformers makes one of two words up, and the score looks right."""
    fields = tiny_weights.fields("reward", name)
    shutil.copytree(fields["path"], tmp_path / "it")
    (tmp_path / "it" / "tokenizer.json").unlink()
    message = (
        f"reward {name} cannot read prompts: {tmp_path}/it has no whole .*Tokenizer, it lacks vocab.* Fetch .* from"
    )
    with pytest.raises(ValueError, match=message):
        build("reward", name, path=str(tmp_path / "it")).check((3, 20, 20))


@pytest.mark.parametrize("name", PROMPTED)
def test_a_reward_with_another_model_s_tokenizer_is_refused(name, tmp_path):
    from transformers import BertTokenizer, CLIPTokenizer

    shutil.copytree(tiny_weights.fields("reward", name)["path"], tmp_path / "it")
    cls = BertTokenizer if name in ("image_reward", "vqa_yes") else CLIPTokenizer
    words = (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if cls is BertTokenizer else ["<|startoftext|>", "<|endoftext|>"]
    )
    cls(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "it")
    with pytest.raises(ValueError, match="/it has . tokens, but its network was trained with .., so texts would not"):
        scores(name, SAMPLES, path=str(tmp_path / "it"))


def test_what_reads_pictures_alone_needs_no_tokenizer(tmp_path):
    for kind, name in (("reward", "aesthetic"), ("features", "clip")):
        folder = tmp_path / name
        shutil.copytree(tiny_weights.fields(kind, name)["path"], folder)
        for path in folder.glob("tokenizer*"):
            path.unlink()
        found = build(kind, name, path=str(folder))(SAMPLES, None)
        torch.testing.assert_close(found, build(kind, name)(SAMPLES, None))


# --- definitions -----------------------------------------------------------------------------------------------------


def stock_clip(samples, prompts):
    """Logits over their scale of transformers' own model on its own tokens."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = tiny_weights.clip()
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**tokens, pixel_values=Preparation(16)(samples))
    return found.logits_per_image.diagonal() / model.logit_scale.exp(), model.logit_scale.exp()


def test_clip_score_and_pick_score_are_transformers_own_similarities():
    cosine, scale = stock_clip(SAMPLES[:3], tiny_weights.PROMPTS)
    torch.testing.assert_close(
        scores("clip_score", SAMPLES[:3]), 100 * cosine.clamp(min=0).detach(), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(scores("pick_score", SAMPLES[:3]), (scale * cosine).detach(), rtol=1e-4, atol=1e-4)


def test_hps_v2_reads_open_clips_weights_as_open_clip_does():
    folder, model = tiny_weights.open_clip()
    tower = clip_tower.load(str(folder), "test", "cpu", "HPS_v2.1_compressed.pt")
    tokens = tower._tokenizer(
        tiny_weights.PROMPTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        pictures = model.visual(Preparation(16, fit="pad")(SAMPLES[:3]))
        expected = torch.nn.functional.cosine_similarity(pictures, model.text(tokens))
    torch.testing.assert_close(scores("hps_v2", SAMPLES[:3]), expected, rtol=1e-4, atol=1e-5)


def test_the_aesthetic_score_is_the_head_on_the_unit_embedding():
    folder = tiny_weights.aesthetic()
    tower = clip_tower.load(str(folder), "test", "cpu")
    x = tower.pictures(Preparation(16)(SAMPLES)).double()
    x = x / x.norm(dim=1, keepdim=True)
    state = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth")
    for number in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{number}.weight"].double().T + state[f"layers.{number}.bias"].double()
    torch.testing.assert_close(scores("aesthetic", SAMPLES).double(), x[:, 0], rtol=1e-4, atol=1e-5)


def test_image_reward_is_the_standardised_head_on_the_first_token():
    _, network = tiny_weights.image_reward()
    reward = build("reward", "image_reward")
    loaded, tokenizer = blip_tower.load_image_reward(reward.path, reward.revision, reward.weights, 16, "cpu")
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    given = tokenizer(tiny_weights.PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        seen = network.vision_model(pixel_values=Preparation(16)(SAMPLES[:3])).last_hidden_state
        first = network.text_encoder(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        raw = network.head(first)[:, 0]
    torch.testing.assert_close(scores("image_reward", SAMPLES[:3]), (raw - 0.16717) / 1.03334, rtol=1e-4, atol=1e-5)


def test_vqa_yes_is_a_probability_and_that_of_transformers_own_decoder():
    from transformers import AutoTokenizer, BlipForQuestionAnswering

    folder = tiny_weights.vqa()
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer("does this picture show a red cat?", return_tensors="pt")
    with torch.no_grad():
        seen = model.vision_model(pixel_values=Preparation(16, fit="squash")(SAMPLES[:1])).last_hidden_state
        asked = model.text_encoder(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], encoder_hidden_states=seen
        )[0]
        logits = model.text_decoder(input_ids=torch.tensor([[4]]), encoder_hidden_states=asked).logits
        expected = logits[0, 0].double().softmax(0)
    yes, no = (scores("vqa_yes", SAMPLES[:1], answer=word).item() for word in ("yes", "no"))
    assert yes == pytest.approx(expected[6].item(), rel=1e-4)
    assert no == pytest.approx(expected[7].item(), rel=1e-4)
    both = scores("vqa_yes", SAMPLES[:1], answer="yes no").item()
    assert 0 < both < yes  # a longer answer is less likely


def test_vqa_yes_needs_a_place_for_the_prompt():
    with pytest.raises(ValueError, match="reward.question must hold {} where the prompt goes"):
        build("reward", "vqa_yes", question="is it good?")


@pytest.mark.parametrize("name", FEATURES)
def test_features_do_not_depend_on_the_batch(name):
    extractor = build("features", name)
    whole = extractor(SAMPLES, None)
    assert whole.shape == (7, extractor.dim((3, 20, 20)))
    single = torch.cat([extractor(SAMPLES[i : i + 1], None) for i in range(7)])
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-5)


def test_dinov2_refuses_a_size_that_cuts_patches():
    with pytest.raises(ValueError, match="must be a multiple of the model's patch of 14 pixels, got 30"):
        build("features", "dinov2", size=30).check((3, 32, 32))


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "size"), [(64, 16), (16, 48), (33, 20)])
def test_resizing_is_pillows_bicubic_up_to_its_rounding(side, size):
    levels = np.random.default_rng(0).integers(80, 176, (side, side, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(levels).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    samples = torch.from_numpy(levels.astype(np.float64) / 127.5 - 1).permute(2, 0, 1)[None]
    prepared = Preparation(size, mean=(0, 0, 0), std=(1, 1, 1))(samples)[0].permute(1, 2, 0).numpy() * 255
    # Pillow rounds after each of two passes (and clips, which these levels do not reach).
    assert np.abs(prepared - theirs).max() < 1.51
    assert np.abs(prepared - theirs).mean() < 0.5


def test_crop_keeps_the_middle_pad_adds_black_and_squash_keeps_all():
    wide = torch.full((1, 3, 8, 16), 1.0)
    wide[..., :4] = -1.0
    crop, pad, squash = (Preparation(8, (0, 0, 0), (1, 1, 1), fit=fit)(wide) for fit in ("crop", "pad", "squash"))
    assert crop.shape == pad.shape == squash.shape == (1, 3, 8, 8)
    assert (crop == 1).all()
    assert (pad[..., :2, :] == 0).all() and (pad[..., 6:, :] == 0).all() and pad[..., 3, 7].mean() > 0.9
    assert squash[..., 0].mean() < 0.1 < 0.9 < squash[..., 7].mean()


def test_grey_is_three_equal_colours_with_their_own_scales():
    grey = torch.rand(2, 1, 16, 16) * 2 - 1
    found = Preparation(16)(grey)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(found * std + mean, ((grey + 1) / 2).expand(-1, 3, -1, -1))


# --- the model's prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTED)
def test_without_prompts_of_its_own_a_reward_reads_the_model_s_by_label(name):
    reward = build("reward", name, prompts=[]).reading(tuple(tiny_weights.PROMPTS))
    reward.check((3, 20, 20))
    assert reward.needs_labels and not hasattr(reward, "at")
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    with torch.no_grad():
        found = reward(SAMPLES, labels)
        own = build("reward", name).at(labels)(SAMPLES, None)  # row i of its own prompts is number i
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs a prompt for each of 7 samples: a label below 3"):
        reward(SAMPLES, labels + 1)
    with pytest.raises(ValueError, match="needs a prompt for each of 7 samples"):
        reward(SAMPLES, None)


def test_prompts_of_its_own_are_not_replaced_by_the_model_s():
    reward = build("reward", "clip_score").reading(("a house",))
    with torch.no_grad():
        found = reward.at(torch.arange(7))(SAMPLES, torch.zeros(7, dtype=torch.int64))
    assert not reward.needs_labels
    torch.testing.assert_close(found, scores("clip_score", SAMPLES))


def weighted(**fields):
    parts = [{"name": n} | tiny_weights.fields("reward", n) | fields for n in ("clip_score", "pick_score")]
    return registry.rewards.build({"name": "weighted", "rewards": [*parts, {"name": "ink"}], "weights": [1, -0.5, 2]})


def test_a_weighted_sum_passes_prompts_and_rows_to_its_parts():
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    with torch.no_grad():
        clip, pick = (build("reward", name).at(labels)(SAMPLES, None) for name in ("clip_score", "pick_score"))
        wanted = clip.double() - 0.5 * pick.double() + 2 * build("reward", "ink")(SAMPLES, None).double()
        by_row = weighted().at(labels)(SAMPLES, None)
        read = weighted(prompts=[]).reading(tuple(tiny_weights.PROMPTS))
        by_label = read(SAMPLES, labels)
    for found in (by_row, by_label):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert weighted().by_prompt and not weighted().needs_labels
    assert read.needs_labels and not hasattr(read, "at")
    plain = registry.rewards.build({"name": "weighted"})
    assert not hasattr(plain, "at") and not plain.needs_labels


def test_where_the_weights_of_a_weighted_sum_s_parts_lie_is_no_part_of_its_key(tmp_path):
    shutil.copytree(tiny_weights.clip(), tmp_path / "moved")
    parts = [{"name": "clip_score", "path": str(place)} for place in (tiny_weights.clip(), tmp_path / "moved")]
    specs = [registry.rewards.complete({"name": "weighted", "rewards": [part], "weights": [1]}) for part in parts]
    assert scorer_identity(specs[0]) == scorer_identity(specs[1])
    other = [{"name": "clip_score", "path": str(tiny_weights.clip(1))}]
    assert scorer_identity(specs[0] | {"rewards": other}) != scorer_identity(specs[0])
