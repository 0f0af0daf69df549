"""Training on the Seq2SeqTrainer of Transformers."""
