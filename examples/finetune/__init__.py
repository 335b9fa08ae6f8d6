"""Fine-tuning a shipped policy on teleoperated recordings of a new task: see docs/finetune.md."""
