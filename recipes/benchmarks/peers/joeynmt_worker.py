"""Some training steps of JoeyNMT, timed; runs in the environment of the peer.

A line of standard input is what `peer_training.py` asks for; the answer holds the target `tokens` of the measured
steps, the `cells` of their batches, and `seconds` of processor time.
"""

import json
import sys
import time

import joeynmt.training
import torch

marks = []


class TimedTrainManager(joeynmt.training.TrainManager):
    def _train_step(self, batch):
        marks.append((time.process_time(), int(batch.ntokens), batch.trg.numel()))
        return super()._train_step(batch)


def create_config(request):
    stack = {
        "type": "transformer",
        "num_layers": request["layers"],
        "num_heads": request["heads"],
        "embeddings": {"embedding_dim": request["d_model"], "scale": True, "dropout": request["dropout"]},
        "hidden_size": request["d_model"],
        "ff_size": request["ffn_dim"],
        "dropout": request["dropout"],
        "layer_norm": "post",
    }
    side = {"level": "word", "lowercase": False, "max_length": -1, "voc_file": request["vocabulary"]}
    side |= {"tokenizer_type": "none"}
    return {
        "name": "throughput",
        "model_dir": request["folder"],
        "use_cuda": False,
        "random_seed": request["seed"],
        "data": {
            "train": request["corpus"],
            "dev": request["corpus"],
            "sample_dev_subset": 1,
            "dataset_type": "plain",
            "src": {"lang": "src", **side},
            "trg": {"lang": "trg", **side},
        },
        "model": {
            "initializer": "xavier_uniform",
            "tied_embeddings": True,
            "tied_softmax": True,
            "encoder": dict(stack),
            "decoder": dict(stack),
        },
        "training": {
            "optimizer": "adamw",
            "learning_rate": request["learning_rate"],
            "scheduling": "noam",
            "clip_grad_norm": 1.0,
            "normalization": "tokens",
            "loss": "crossentropy",
            "label_smoothing": request["label_smoothing"],
            "batch_size": request["batch_tokens"],
            "batch_type": "token",
            "shuffle": True,
            # A step's time ends where the next begins.
            "updates": request["warmup"] + request["steps"] + 1,
            "epochs": 10,
            "logging_freq": 100000,
            "validation_freq": 100000,
        },
        "testing": {},
    }


def main():
    torch.set_num_threads(1)
    joeynmt.training.TrainManager = TimedTrainManager
    request = json.loads(sys.stdin.readline())
    joeynmt.training.train(0, 0, create_config(request), skip_test=True)
    measured = marks[request["warmup"] : request["warmup"] + request["steps"] + 1]
    tokens, cells = (sum(mark[number] for mark in measured[:-1]) for number in (1, 2))
    print(json.dumps({"tokens": tokens, "cells": cells, "seconds": measured[-1][0] - measured[0][0]}), flush=True)


if __name__ == "__main__":
    main()
