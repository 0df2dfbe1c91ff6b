from lightning_kd.cli.settings import fingerprint
from lightning_kd.cli.teacher import alone

SCHEDULER = {"class_path": "lightning_kd.callbacks.TemperatureScheduler", "init_args": {"term": "kd"}}
MONITOR = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}


def test_the_student_alone_has_no_schedules_of_terms_and_is_otherwise_the_same() -> None:
    model = {"student": 1, "terms": 2, "teacher": 3}
    bare = {"model": model, "trainer": {"max_epochs": 2}}
    scheduled = {"model": model, "trainer": {"max_epochs": 2, "callbacks": [SCHEDULER]}}
    both = {"model": model, "trainer": {"max_epochs": 2, "callbacks": [MONITOR, SCHEDULER]}}
    assert fingerprint(alone(scheduled)) == fingerprint(alone(bare))
    unsaid = bare | {"trainer": bare["trainer"] | {"callbacks": None}}  # as a configuration with its defaults has it
    assert fingerprint(alone(unsaid)) == fingerprint(alone(bare))
    assert alone(both)["trainer"]["callbacks"] == [MONITOR]
    assert scheduled["trainer"]["callbacks"] == [SCHEDULER]
