"""Some training steps of eole, timed; runs in the environment of the peer.

A line of standard input is what `peer_training.py` asks for; the answer holds the target `tokens` of the measured
steps, the `cells` of their batches, and `seconds` of processor time. The encoder is post-LN with a last normalization
more; a post-LN decoder eole does not have, its decoder is pre-LN.
"""

import json
import sys
import time
from pathlib import Path

import eole.trainer
import torch
import yaml
from eole.bin.main import main as eole_main

marks = []


class TimedTrainer(eole.trainer.Trainer):
    def _train_step(self, batches, *args, **kwargs):
        targets = [batch["tgt"][:, 1:] for batch in batches]
        tokens = sum(int(target.ne(self.train_loss.padding_idx).sum()) for target in targets)
        marks.append((time.process_time(), tokens, sum(target.numel() for target in targets)))
        return super()._train_step(batches, *args, **kwargs)


def create_config(request):
    stack = {"layers": request["layers"], "hidden_size": request["d_model"]}
    transformer = {
        "heads": request["heads"],
        "transformer_ff": request["ffn_dim"],
        "mlp_activation_fn": "relu",
        "add_qkvbias": True,
        "add_final_linear_bias": True,
        "add_ffnbias": True,
    }
    return {
        "seed": request["seed"],
        "share_vocab": True,
        "src_vocab": request["vocabulary"],
        "tgt_vocab": request["vocabulary"],
        "src_vocab_size": request["vocabulary_size"],
        "tgt_vocab_size": request["vocabulary_size"],
        "data": {"corpus": {"path_src": request["corpus"] + ".src", "path_tgt": request["corpus"] + ".trg"}},
        "report_every": 100000,
        "training": {
            "model_path": request["folder"],
            "compute_dtype": "fp32",
            "optim": "adamw",
            "learning_rate": request["learning_rate"],
            "max_grad_norm": 1.0,
            "batch_type": "tokens",
            "normalization": "tokens",
            "batch_size": request["batch_tokens"],
            "accum_count": [1],
            "num_workers": 0,
            "dropout": [request["dropout"]],
            "attention_dropout": [0.0],
            "label_smoothing": request["label_smoothing"],
            # A step's time ends where the next begins.
            "train_steps": request["warmup"] + request["steps"] + 1,
            "valid_steps": 100000,
            "save_checkpoint_steps": 100000,
        },
        "model": {
            "architecture": "transformer",
            "share_embeddings": True,
            "share_decoder_embeddings": True,
            "embeddings": {"word_vec_size": request["d_model"], "position_encoding_type": "SinusoidalInterleaved"},
            "encoder": {"encoder_type": "transformer", "encoder_layer_style": "postnorm", **stack, **transformer},
            "decoder": {"decoder_type": "transformer", **stack, **transformer},
        },
    }


def main():
    torch.set_num_threads(1)
    eole.trainer.Trainer = TimedTrainer
    request = json.loads(sys.stdin.readline())
    config = Path(request["folder"]) / "eole.yaml"
    config.write_text(yaml.safe_dump(create_config(request)))
    sys.argv = ["eole", "train", "-config", str(config)]
    eole_main()
    measured = marks[request["warmup"] : request["warmup"] + request["steps"] + 1]
    tokens, cells = (sum(mark[number] for mark in measured[:-1]) for number in (1, 2))
    print(json.dumps({"tokens": tokens, "cells": cells, "seconds": measured[-1][0] - measured[0][0]}), flush=True)


if __name__ == "__main__":
    main()
