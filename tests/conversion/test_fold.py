"""A folded model is post-LN and computes what the original does."""

import json

import pytest
import torch
from plain_transformers import EMBEDDINGS, EXACT, make_model, random_batch
from transformers import AutoModelForSeq2SeqLM

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.cli import main
from hf_rskip.conversion.fold import fold, is_frozen, measured
from hf_rskip.errors import UserError
from hf_rskip.models import SKIP_CONNECTIONS
from hf_rskip.models.skip_connections import RSkip


@torch.no_grad()
def log_probs(model, batch):
    return model(**batch).logits.log_softmax(-1)


@pytest.mark.parametrize("embeddings", EMBEDDINGS)
@pytest.mark.parametrize("kind", EXACT)
def test_the_same_output(kind, embeddings, tmp_path):
    model = make_model(**kind, **embeddings)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fold(model).save_pretrained(tmp_path)
    folded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert (folded.config.skip_type, folded.config.skip_recursions) == ("rskip", 1)
    assert folded.config.learned_positions == (kind["skip_type"] == "admin")

    batch = random_batch(model.config)
    expected = log_probs(model, batch)
    torch.testing.assert_close(log_probs(folded, batch), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5  # not all the same
    source = {name: batch[name][:24] for name in ("input_ids", "attention_mask")}
    for num_beams in (1, 4):
        options = {"num_beams": num_beams, "max_new_tokens": 8}
        assert torch.equal(folded.generate(**source, **options), model.generate(**source, **options))


def test_a_large_eps_scales_the_tables():
    """In the first norm a weight that went into `out_proj` would change what is added to the variance."""
    model = make_model(skip_type="xskip", skip_scale=3.0, scale_embedding=False, layer_norm_eps=1e-3)
    batch, folded = random_batch(model.config), fold(model)
    assert folded.config.learned_positions
    torch.testing.assert_close(log_probs(folded, batch), log_probs(model, batch), rtol=0, atol=1e-4)


def test_admin_that_was_not_trained_keeps_its_embeddings():
    config = make_model(skip_type="admin").config
    folded = fold(RSkipForConditionalGeneration(config))
    assert folded.config.tie_word_embeddings and not folded.config.learned_positions


def test_folded_a_second_time():
    model = make_model(skip_type="admin")
    batch, once = random_batch(model.config, rows=8), fold(model)
    torch.testing.assert_close(log_probs(fold(once), batch), log_probs(once, batch), rtol=0, atol=1e-5)


FROZEN = [
    *({"skip_norm_affine": affine, "skip_recursions": k} for affine in ("per_step", "shared", "last") for k in (2, 4)),
    {"skip_recursions": 3, "skip_norm": "rms_norm"},
    {"skip_recursions": 3, "skip_type": "rskip_detached"},
]


@pytest.mark.parametrize("kind", FROZEN, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("embeddings", EMBEDDINGS)
def test_freezing_is_exact_where_nothing_varies(kind, embeddings):
    """With one token on each side, each mean over data is that token's own value."""
    model = make_model(**kind, **embeddings)
    batch = random_batch(model.config, rows=2)
    one = {name: rows[:1, :1] for name, rows in batch.items()}
    with measured(model) as statistics:
        expected = log_probs(model, one)
    folded = fold(model, statistics)
    torch.testing.assert_close(log_probs(folded, one), expected, rtol=0, atol=1e-4)
    other = {name: rows[1:, :1] for name, rows in batch.items()}
    assert (log_probs(folded, other) - log_probs(model, other)).abs().max() > 1e-3


def test_freezing_holds_the_means():
    """Against rSkip whose inner norm takes its mean and deviation from all real tokens instead of each one's own."""
    model = make_model(skip_recursions=2)
    batch = random_batch(model.config)
    calls = {}

    def record(skip, args, output):
        x, branch, mask = args
        calls[skip] = (x[mask], (x + branch)[mask])

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, RSkip)]
    with measured(model) as statistics:
        log_probs(model, batch)
    for hook in hooks:
        hook.remove()
    folded = fold(model, statistics)

    def replace(skip, args, output):
        x, branch, _ = args
        old_x, old_sum = calls[skip]
        sigma = (old_sum.var(-1, correction=0) + skip.norm[0].eps).sqrt().mean()
        centred = x + branch - branch.mean(-1, keepdim=True) - old_x.mean()
        return skip.norm[1](x + skip.norm[0].weight * centred / sigma + skip.norm[0].bias)

    for module in model.modules():
        if isinstance(module, RSkip):
            module.register_forward_hook(replace)
    torch.testing.assert_close(log_probs(folded, batch), log_probs(model, batch), rtol=0, atol=1e-4)


def test_learned_positions_are_saved_and_trained(tmp_path):
    model = make_model(learned_positions=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    batch = random_batch(model.config, rows=4)
    assert torch.equal(log_probs(loaded, batch), log_probs(model, batch))
    loaded(**batch).logits.sum().backward()
    assert all(
        stack.embed_positions.weight.grad.abs().sum() > 0 for stack in (loaded.model.encoder, loaded.model.decoder)
    )
    fresh = RSkipForConditionalGeneration(model.config).model.encoder.embed_positions
    assert torch.equal(fresh.weight, fresh.create_weight())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skip_type": "pre_norm"}, "'pre_norm' cannot be folded .* adds up the outputs of all branches"),
        ({"skip_type": "peri_norm"}, "'peri_norm' cannot be folded .* without normalising the sum"),
        ({"skip_type": "b2t"}, "'b2t' cannot be folded .* past the norms between"),
        ({"skip_type": "keel"}, "'keel' cannot be folded .* once more"),
        ({"skip_type": "xskip", "skip_norm": "batch_norm"}, "'batch_norm' cannot be folded .* divides by constants"),
        ({"skip_type": "rezero", "skip_norm": "none"}, "'none' cannot be folded .* without a norm"),
        ({"skip_type": "xskip", "skip_scale": 0.0}, r"encoder\.layers\.0\.self_attn_skip multiplies x, .* by 0"),
        ({"skip_type": "rskip", "skip_recursions": 2}, "no sentence pairs to measure them"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(UserError, match=message):
        fold(make_model(**values))


def test_every_kind_folds_or_is_refused_with_its_reason():
    for kind in SKIP_CONNECTIONS:
        try:
            is_frozen(RSkipConfig(skip_type=kind))
        except UserError as error:
            assert "was added" not in str(error)


def run(capsys, *words):
    code = main(["convert", "fold", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_freezes_on_data(trained, corpus_folder, pairs, tmp_path, capsys):
    data = ("--dataset_name", corpus_folder, "--split", "validation")
    code, out, err = run(capsys, trained.folder, tmp_path / "new", *data[:2])  # by default not the test set
    assert code == 0, err
    assert "rskip, K = 1, in place of skip_type: rskip" in out
    assert "BLEU: " in out and "chrF: " in out and "of 30\n" in out
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["skip_recursions"], config["source_lang"], config["learned_positions"]) == (1, "en", True)
    assert main(["evaluate", str(tmp_path / "new"), *data]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert "BLEU: " in out and f", {scores['bleu']:.2f} after" in out

    code, out, err = run(capsys, tmp_path / "new", tmp_path / "again")
    assert code == 0, err
    assert "exactly" in out and "BLEU" not in out


def test_command_refuses(trained, trained_resnet, corpus_folder, tmp_path, capsys):
    new = tmp_path / "new"
    for words, message in [
        ([trained.folder, new], "give sentence pairs by --dataset_name or --test_files"),
        ([trained_resnet.folder, new], "only one of type 'rskip'"),
        ([trained.folder, new, "--max_samples", "3"], "--max_samples needs a --dataset_name"),
        ([trained.folder, new, "--skip_recursions", "1"], "`--skip_recursions` is for marian"),
        ([trained.folder, new, "--test_files", "a", "b"], "test_files names a file that does not exist"),
        ([trained.folder, trained.folder], "not an empty folder"),
    ]:
        code, _, err = run(capsys, *words)
        assert code == 2 and message in err, err
    assert main(["convert", "resnet", "a", str(new), "--dataset_name", corpus_folder]) == 2
    assert "--dataset_name is for fold" in capsys.readouterr().err
    assert not new.exists()
