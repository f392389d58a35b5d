"""Our layers and optimizer inside other libraries: PEFT, the Hugging Face Trainer."""
