"""Training adapters with transformers' Trainer. Importing this package needs PEFT and accelerate."""
