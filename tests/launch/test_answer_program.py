"""Fine-tuning on questions and answering them, by the programs: the answer is read out of the passage."""

import json
import shutil

import pytest
from small_run import error_line, run_program

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gil", "Hal")
RECIPE = """
from retro_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict


def get_config():
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset("tiny", chunk_length=8, neighbour_length=16),
            init_from={base!r},
            unfreeze_decoder=True,
            data=DataConfig(sequences=({sequences!r},), neighbours=1),
            optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=5, weight_decay=0.0),
            checkpoint=CheckpointConfig(every_steps=120, keep_every=120),
            steps=240,
            batch_size=8,
            log_every=120,
        )
    )
"""


@pytest.fixture(scope="module")
def answered(finished_run, tmp_path_factory):
    """(workdir, questions, root): a RETRO fine-tuned on one question, which has another answer with every passage.

    The model that it began with is there no more.
    """
    root = tmp_path_factory.mktemp("answers")
    base = shutil.copytree(finished_run, root / "base")
    rows = [
        {"question": "Who?", "answers": [name], "ctxs": [{"title": name, "text": f"{name} is it."}]} for name in NAMES
    ]
    questions = root / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout = ("--prompt_chunks=3", "--passages=1", "--chunk_length=8", "--neighbour_length=16")
    status, _, stderr = run_program(
        "tools/write_answers.py",
        f"--examples={questions}",
        f"--tokenizer={finished_run / 'tokenizer.model'}",
        *layout,
        f"--output={root / 'sequences'}",
    )
    assert status == 0, stderr
    recipe = root / "answers.py"
    recipe.write_text(RECIPE.format(base=str(base), sequences=str(root / "sequences")))
    status, stdout, stderr = run_program("launch/train.py", f"--config={recipe}", f"--workdir={root / 'run'}")
    assert status == 0, stderr
    assert "step 240: loss" in stdout
    shutil.rmtree(base)
    return root / "run", questions, root


def test_answers_are_read_out_of_the_passages_and_without_them_one_of_eight_is_right(answered):
    workdir, questions, root = answered
    output = root / "answers.json"
    status, stdout, stderr = run_program(
        "launch/answer.py",
        f"--workdir={workdir}",
        f"--examples={questions}",
        "--modes=on,off",
        "--steps=all",
        f"--output={output}",
    )
    assert status == 0, stderr
    found = json.loads(output.read_text())
    results = {(result["step"], result["mode"]): result for result in found["results"]}
    assert set(results) == {(step, mode) for step in (120, 240) for mode in ("on", "off")}
    last = results[240, "on"]
    assert [answer["prediction"] for answer in last["answers"]] == list(NAMES)
    assert last["exact_match"] == last["f1"] == 1 and results[240, "off"]["exact_match"] <= 1 / 8
    assert found["best_steps"][str(workdir)] in (120, 240)
    assert f"{workdir}: most exact matches at step" in stdout and "| 100.0 %" in stdout


def test_mistakes_are_named_in_one_line(answered, finished_run, tmp_path):
    workdir, questions, _ = answered
    flags = (f"--workdir={workdir}", f"--examples={questions}")
    assert "no checkpoint of step 3; there are 120, 240" in error_line("launch/answer.py", *flags, "--steps=3")
    assert "--steps=x: expected numbers of steps, or all" in error_line("launch/answer.py", *flags, "--steps=x")
    assert "was not written by tools/write_answers.py" in error_line(
        "launch/answer.py", f"--workdir={finished_run}", f"--examples={questions}"
    )
    shutil.copytree(workdir, tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["data"]["sequences"] = [str(tmp_path / "gone")]
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    line = error_line("launch/answer.py", f"--workdir={tmp_path / 'moved'}", f"--examples={questions}")
    assert "--sequences names those that say how questions are laid out" in line


def test_a_run_is_found_finished_without_the_model_that_it_began_with(answered):
    workdir, _, root = answered
    flags = (f"--config={root / 'answers.py'}", f"--workdir={workdir}")
    status, stdout, stderr = run_program("launch/train.py", *flags)
    assert status == 0, stderr
    assert "init_from is not needed any more, and cannot be opened" in stderr and "step 240: loss" in stdout
    line = error_line("launch/train.py", *flags, f"--config.init_from={root / 'another'}")
    assert "so neither a run nor a model is here" in line
