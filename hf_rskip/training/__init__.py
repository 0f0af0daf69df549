"""Training of translation models and image classifiers with the Trainer of Transformers."""
