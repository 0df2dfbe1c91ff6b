"""What makes a run of ``digits_kd`` on the command line short, and what makes it one of the student alone."""

SMALL = [
    "--trainer.max_epochs", "2", "--teacher_fit.max_epochs", "2",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
ALONE = ["--model.teacher", "null", "--model.terms", "null", "--teacher_fit", "null"]
