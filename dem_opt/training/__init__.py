"""Fine-tune the base on one distribution with transformers' Trainer.

`fine_tune` does a whole fine-tuning, `trainer` configures the Trainer, `lora` adds adapters. Imports evaluation, data
and the packages below them; never export or dashboards.
"""
