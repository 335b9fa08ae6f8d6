"""Our wordings: all 34 tasks, enough of them, apart from each other and from CALVIN's."""

import json
import os
from pathlib import Path

import pytest

from envs.calvin import language

CALVIN_TASKS = 34


def test_every_task_has_ten_training_and_three_validation_wordings():
    training, validation = language.training_wordings(), language.validation_wordings()
    assert len(training) == CALVIN_TASKS and training.keys() == validation.keys()
    assert min(map(len, training.values())) >= 10
    assert min(map(len, validation.values())) >= 3


def test_no_sentence_is_used_twice():
    sentences = [s for group in (language.training_wordings(), language.validation_wordings()) for ss in group.values() for s in ss]
    assert len(sentences) == len(set(sentences))
    assert all(sentence == sentence.strip().lower() for sentence in sentences)


@pytest.mark.parametrize("task", sorted(language.training_wordings()))
def test_sentences_name_colour_and_direction_of_their_task(task):
    words = task.split("_")
    needed = set(words) & {*language.COLOURS, *language.SIDES}
    for sentence in language.training_wordings()[task] + language.validation_wordings()[task]:
        present = set(sentence.replace(",", " ").replace(".", " ").split())
        assert needed <= present, sentence
        assert not (present & {*language.COLOURS, *language.SIDES}) - needed, sentence


def test_task_of_inverts_the_wordings_and_refuses_others():
    for group in (language.training_wordings(), language.validation_wordings()):
        for task, sentences in group.items():
            assert [language.task_of(sentence.upper()) for sentence in sentences] == [task] * len(sentences)
    with pytest.raises(ValueError, match="none of our .* sentences"):
        language.task_of("make me a sandwich")


def test_validation_instruction_is_the_first_and_unknown_tasks_are_refused():
    assert language.validation_instruction("open_drawer") == language.validation_wordings()["open_drawer"][0]
    with pytest.raises(ValueError, match="unknown task 'open_door'"):
        language.validation_instruction("open_door")


def test_no_sentence_is_calvins():
    folder = os.environ.get("EMU3_VLA_REFERENCE")
    if not folder:
        pytest.skip("EMU3_VLA_REFERENCE is not set: CALVIN's sentences are not at hand to compare with")
    annotations = json.loads((Path(folder) / "calvin" / "annotations.json").read_text())
    theirs = {s.strip().lower() for split in ("training", "validation") for ss in annotations[split].values() for s in ss}
    tasks = set(annotations["training"])
    assert tasks == set(language.training_wordings())
    for group in (language.training_wordings(), language.validation_wordings()):
        assert not {s for ss in group.values() for s in ss} & theirs
