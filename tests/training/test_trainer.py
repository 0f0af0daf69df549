"""The trainer in one process and in two: which batches it draws, what a step does with them, where a run goes on.

This file is also the program of the two processes: `torchrun --nproc_per_node 2 test_trainer.py FOLDER`.
"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, EarlyStoppingCallback, set_seed
from transformers.trainer_callback import TrainerState

from hf_rskip.data.text.tokenizer import train_tokenizer
from hf_rskip.errors import UserError
from hf_rskip.models import RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.probing.table import read_table
from hf_rskip.recipe.translation import RSkipTrainingArguments
from hf_rskip.training.averaging import choose_checkpoints
from hf_rskip.training.best_model import BestModelCallback
from hf_rskip.training.trainer import RSkipTrainer

EOS, VOCABULARY = 2, 260
EPOCHS = 2
SMOOTHING = [0.0, 0.1]


class RecordingTrainer(RSkipTrainer):
    """Remembers the sentences of the batches it trains on, by epoch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drawn = {}

    def training_step(self, model, inputs, *args, **kwargs):
        # The first two tokens of a sentence are its number.
        numbers = ((inputs["input_ids"][:, 0] - 4) * 100 + inputs["input_ids"][:, 1] - 4).tolist()
        self.drawn.setdefault(int(self.state.epoch), []).append(numbers)
        return super().training_step(model, inputs, *args, **kwargs)


def create_corpus(lengths):
    rows = {"input_ids": [], "labels": []}
    for number, (source, target) in enumerate(lengths):
        rows["input_ids"].append([4 + number // 100, 4 + number % 100, *(5 + i * number % 200 for i in range(source))])
        rows["labels"].append([4 + (number + i) % 200 for i in range(target)])
    rows = {name: [[*ids, EOS] for ids in side] for name, side in rows.items()}
    lengths = {"source_length": map(len, rows["input_ids"]), "target_length": map(len, rows["labels"])}
    return Dataset.from_dict(rows | {name: list(values) for name, values in lengths.items()})


def create_trainer(folder, lengths, callbacks=(), metrics=None, **arguments):
    set_seed(0)
    config = RSkipConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        dropout=0.0,
    )
    model = RSkipForConditionalGeneration(config)
    fixed = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    quiet = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    corpus = create_corpus(lengths)
    return RecordingTrainer(
        model=model,
        args=RSkipTrainingArguments(**fixed, **quiet | arguments),
        data_collator=DataCollatorForSeq2Seq(train_tokenizer([], VOCABULARY)),
        train_dataset=corpus,
        eval_dataset=corpus.select(range(4)),
        compute_translation_metrics=metrics,
        callbacks=list(callbacks),
    )


# Sentences of 4 to 13 tokens in batches of 40: 24 batches or so.
COVERAGE_LENGTHS = [(1 + number % 7, 3 + number * number % 10) for number in range(101)]


def draw_epochs(folder):
    """What two epochs draw, uninterrupted and, from the middle of the second epoch, resumed."""
    arguments = {"per_device_train_batch_tokens": 40, "num_train_epochs": EPOCHS, "learning_rate": 1e-3}
    whole = create_trainer(folder, COVERAGE_LENGTHS, **arguments, save_strategy="steps")
    whole.args.save_steps = len(whole.make_sampler()) + 3
    whole.train()
    resumed = create_trainer(folder, COVERAGE_LENGTHS, **arguments)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{whole.args.save_steps}")
    return {
        "whole": [whole.drawn[epoch] for epoch in range(EPOCHS)],
        "resumed": [resumed.drawn.get(epoch, []) for epoch in range(EPOCHS)],
        "weights": [weights_of(whole), weights_of(resumed)],
    }


# All different, and every two of them longer than the longest together.
STEP_LENGTHS = [(8, 9), (14, 7), (9, 13), (11, 8), (10, 11), (12, 10), (13, 14), (7, 12)]
ONE_SENTENCE, HALF, ALL = 17, 4 * 17, 8 * 17


def weights_after_one_step(folder, smoothing, budget, accumulation):
    trainer = create_trainer(
        folder,
        STEP_LENGTHS,
        per_device_train_batch_tokens=budget,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=smoothing,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_steps=1,
    )
    before = weights_of(trainer)
    trainer.train()
    sizes = [len(batch) for batch in trainer.drawn[0]]
    after = weights_of(trainer)
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-2, "a step that shows"
    return sizes, after


def weights_of(trainer):
    return {
        name: weight.detach().clone()
        for name, weight in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }


def evaluate_in_batches(folder):
    """The validation loss of four sentences of different lengths, by the size of the batches."""
    trainers = (
        create_trainer(folder, STEP_LENGTHS, per_device_eval_batch_size=size, chunked_cross_entropy=chunked)
        for size in (1, 3, 4)
        for chunked in (False, True)
    )
    return [trainer.evaluate()["eval_loss"] for trainer in trainers]


def work(folder):
    """What each of the two processes does."""
    results = {"drawn": draw_epochs(folder / "drawn"), "losses": evaluate_in_batches(folder / "evaluation")}
    for smoothing in SMOOTHING:
        results[f"step {smoothing}"] = weights_after_one_step(folder / "step", smoothing, HALF, 1)
    torch.save(results, folder / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(warm_python, tmp_path_factory):
    """The results of the two processes."""
    folder = tmp_path_factory.mktemp("two-processes")
    # --standalone takes a free port of this machine.
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "2"]
    command = [warm_python, "-m", *launcher, __file__, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return draw_epochs(tmp_path_factory.mktemp("one-process"))


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one process", "two processes"])
def ranks(request):
    """What each process drew, of one and of two."""
    if request.param == 1:
        return [request.getfixturevalue("one_process")]
    return [results["drawn"] for results in request.getfixturevalue("two_processes")]


def test_every_epoch_draws_every_sentence_once(ranks):
    for epoch in range(EPOCHS):
        batches = list(itertools.chain.from_iterable(rank["whole"][epoch] for rank in ranks))
        assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(COVERAGE_LENGTHS)))
        assert len({len(rank["whole"][epoch]) for rank in ranks}) == 1
    assert all(rank["whole"][0] != rank["whole"][1] for rank in ranks)


def test_a_resumed_epoch_draws_what_was_left(ranks):
    for rank in ranks:
        assert rank["resumed"] == [[], rank["whole"][1][3:]]
        whole, resumed = rank["weights"]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_data_loader_of_training_is_that_of_the_trainer(tmp_path):
    """With all its keys, on the columns that the model takes."""
    keys = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
    loader = create_trainer(tmp_path, COVERAGE_LENGTHS, **keys).get_train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert loader.dataset.column_names == ["input_ids", "labels"]


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_accumulation_is_a_larger_batch(tmp_path, smoothing):
    accumulated_sizes, accumulated = weights_after_one_step(tmp_path, smoothing, ONE_SENTENCE, 8)
    sizes, weights = weights_after_one_step(tmp_path, smoothing, ALL, 1)
    assert (accumulated_sizes, sizes) == ([1] * 8, [8])
    torch.testing.assert_close(accumulated, weights, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_two_processes_are_accumulation(two_processes, tmp_path, smoothing):
    sizes, weights = weights_after_one_step(tmp_path, smoothing, HALF, 2)
    assert len(sizes) == 2
    for results in two_processes:
        own_sizes, own_weights = results[f"step {smoothing}"]
        assert len(own_sizes) == 1
        torch.testing.assert_close(own_weights, weights, rtol=0, atol=1e-5)


def expected_loss(folder):
    """The mean over all tokens, of one sentence at a time."""
    trainer, total, count = create_trainer(folder, STEP_LENGTHS), 0.0, 0
    for row in trainer.eval_dataset:
        labels = torch.tensor([row["labels"]])
        logits = trainer.model.eval()(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits
        loss = torch.nn.functional.cross_entropy(logits[0], labels[0], label_smoothing=0.1, reduction="sum")
        total, count = total + loss.item(), count + len(row["labels"])
    return total / count


def test_the_validation_loss_is_the_mean_over_tokens(tmp_path):
    assert evaluate_in_batches(tmp_path) == pytest.approx([expected_loss(tmp_path)] * 6, rel=1e-5)


@pytest.mark.slow
def test_the_validation_loss_is_that_of_any_number_of_processes(two_processes, tmp_path):
    for results in two_processes:
        assert results["losses"] == pytest.approx([expected_loss(tmp_path)] * 6, rel=1e-5)


@pytest.mark.parametrize("end", ["patience", "max_steps"])
def test_a_finished_run_does_not_go_on_when_it_is_resumed(tmp_path, end):
    """As after a kill between the last checkpoint and the end."""

    def create():
        scores = itertools.count(100, -1)
        stops = {"patience": {"num_train_epochs": 5, "early_stopping_patience": 2}, "max_steps": {"max_steps": 6}}
        return create_trainer(
            tmp_path,
            COVERAGE_LENGTHS[:40],
            metrics=lambda model: {"bleu": float(next(scores))},
            per_device_train_batch_tokens=40,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            **stops[end],
        )

    whole, resumed = create(), create()
    assert whole.train().global_step == 6 < len(whole.get_train_dataloader()) * 5
    assert resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-6").global_step == 6
    assert not resumed.drawn
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert all(torch.equal(weight, weights_of(resumed)[name]) for name, weight in weights_of(whole).items())

    def history(trainer):
        return [{"step": entry["step"], "bleu": entry.get("eval_bleu")} for entry in trainer.state.log_history]

    assert history(resumed) == history(whole)


@pytest.mark.parametrize("interrupted", [False, True], ids=["whole", "resumed"])
@pytest.mark.parametrize("key", ["bleu", "chrf"])
def test_ties_are_broken_by_chrf_and_then_by_loss(tmp_path, key, interrupted, caplog):
    """A metric that never moves, as BLEU for targets without spaces, and four evaluations, of which the third is best;
    the patience of two counts from there."""
    scores = {"bleu": [0.0] * 6, "chrf": [33.0, 93.0, 100.0, 100.0, 99.0, 98.0]}
    losses = [4.0, 1.0, 2.0, 3.0, 1.0, 1.0]

    class Scores(RSkipTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = losses[self.state.global_step - 1]
            return output

    def create():
        trainer = create_trainer(
            tmp_path,
            COVERAGE_LENGTHS[:20],
            callbacks=[EarlyStoppingCallback(2)],
            metrics=lambda model: {name: values[trainer.state.global_step - 1] for name, values in scores.items()},
            per_device_train_batch_tokens=80,
            max_steps=6,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            save_total_limit=None,
            load_best_model_at_end=True,
            metric_for_best_model=key,
        )
        trainer.__class__ = Scores
        return trainer

    trainer = create()
    trainer.train()
    if interrupted:
        shutil.rmtree(tmp_path / "checkpoint-5")
        caplog.clear()
        trainer = create()
        trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    assert (trainer.state.global_step, trainer.state.best_global_step) == (5, 3)
    assert trainer.state.best_metric == scores[key][2]
    assert trainer.state.best_model_checkpoint == f"{tmp_path}/checkpoint-3"
    # Loss decides between the third and the fourth.
    best = [choose_checkpoints(tmp_path, count, "best", trainer.state, key) for count in (1, 3)]
    assert best == [[tmp_path / f"checkpoint-{step}" for step in steps] for steps in ([3], [3, 4, 5])]
    warned = "bleu was 0 at all 5 evaluations, so the best model was chosen by chrf and loss" in caplog.text
    assert warned == (key == "bleu")


@pytest.mark.parametrize("metric, value, others", [("accuracy", 0.5, "loss"), ("loss", 2, "step")])
def test_the_metric_that_never_moved_is_none_of_those_that_chose(caplog, metric, value, others):
    log = {"eval_loss": 2.0, f"eval_{metric}": value}
    state = TrainerState(log_history=[{"step": 1, **log}, {"step": 2, **log}])
    args = SimpleNamespace(metric_for_best_model=metric, load_best_model_at_end=False)
    BestModelCallback().on_train_end(args, state, None)
    assert f"{metric} was {value} at all 2 evaluations, so the best model was chosen by {others}: set" in caplog.text


def test_a_resumed_run_can_be_given_more_epochs(tmp_path):
    arguments = {"per_device_train_batch_tokens": 80, "save_strategy": "epoch"}
    create_trainer(tmp_path, COVERAGE_LENGTHS[:20], **arguments, num_train_epochs=1).train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    longer = create_trainer(tmp_path, COVERAGE_LENGTHS[:20], **arguments, num_train_epochs=2)
    longer.train(resume_from_checkpoint=str(checkpoint))
    assert list(longer.drawn) == [1]


def test_what_the_trainer_cannot_use_is_refused(tmp_path):
    arguments = {"eval_strategy": "epoch", "per_device_train_batch_tokens": 40}
    with pytest.raises(UserError, match="predict_with_generate needs compute_translation_metrics"):
        create_trainer(tmp_path, COVERAGE_LENGTHS, **arguments)
    trainer = create_trainer(tmp_path, COVERAGE_LENGTHS)
    given = {"model": trainer.model, "args": trainer.args, "data_collator": trainer.data_collator}
    with pytest.raises(UserError, match="compute_metrics is not called: give compute_translation_metrics"):
        RSkipTrainer(**given, compute_metrics=lambda prediction: {})
    with pytest.raises(UserError, match="train_dataset has no column target_length"):
        RSkipTrainer(**given, train_dataset=trainer.train_dataset.remove_columns("target_length"))
    given["args"].probe_steps = 2
    with pytest.raises(UserError, match="train_dataset must be a datasets.Dataset, not a list"):
        RSkipTrainer(**given, train_dataset=list(trainer.train_dataset))
    RSkipTrainer(**given)  # to evaluate


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ema_decay": 0.9}, "ema_decay does not go with FSDP: average_checkpoints does"),
        ({"probe_steps": 2}, "probe_steps does not go with FSDP"),
        (
            {"average_checkpoints": 2, "save_strategy": "steps"},
            "needs fsdp_state_dict_type FULL_STATE_DICT, not SHARDED_STATE_DICT",
        ),
    ],
)
def test_what_shards_cannot_do(tmp_path, monkeypatch, arguments, said):
    trainer = create_trainer(tmp_path, COVERAGE_LENGTHS[:8], **arguments)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(UserError, match=said):
        trainer._check_fsdp()


def test_the_loss_shifts_labels_unless_the_decoder_has_its_input(tmp_path):
    trainer = create_trainer(tmp_path, STEP_LENGTHS, label_smoothing_factor=0.0)
    model, batch = trainer.model, trainer.probe_batch()
    labels, pad = batch["labels"], model.config.pad_token_id
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    tokens = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad)], 1)
    logits = model(batch["input_ids"], batch["attention_mask"], decoder_input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    embeddings = model.model.decoder.embed_tokens(tokens)
    for given in ({}, {"decoder_input_ids": tokens}, {"decoder_inputs_embeds": embeddings}):
        torch.testing.assert_close(trainer.compute_loss(model, batch | given), expected)


def test_a_batch_is_described_without_a_tokenizer(tmp_path):
    trainer = create_trainer(tmp_path, STEP_LENGTHS)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 2)])
    said = "2 pairs of 11 to 12 source tokens and 10 to 14 target tokens"  # with a number of two tokens and EOS
    assert trainer.describe_batch(batch) == said
    del batch["attention_mask"]
    assert trainer.describe_batch(batch).startswith("2 pairs of 12 to 12 source tokens")
    trainer.processing_class = trainer.data_collator.tokenizer
    assert trainer.describe_batch(batch).startswith("2 pairs of") and ", the first '" in trainer.describe_batch(batch)


def test_probe_steps_is_a_key_of_the_trainer_alone(tmp_path):
    create_trainer(tmp_path, COVERAGE_LENGTHS[:20], max_steps=3, probe_steps=2).train()
    assert [item.step for item in read_table(tmp_path / "probe.csv")] == [0, 2]


def test_logs_count_target_tokens(tmp_path):
    trainer = create_trainer(tmp_path, COVERAGE_LENGTHS, per_device_train_batch_tokens=40, max_steps=4, logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["target_tokens_per_second"] > 0 for entry in logs)
    assert json.loads(json.dumps(logs)) == logs


if __name__ == "__main__":
    work(Path(sys.argv[1]))
