"""What a planted question asks for stands in one entry of the register alone."""

import json

from small_run import error_line, run_program

FLAGS = ("--people=30", "--held_out=6", "--late=4")


def make(directory, *flags):
    status, _, stderr = run_program("tools/make_planted_text.py", f"--output={directory}", *flags)
    assert status == 0, stderr
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in directory.iterdir()}


def test_answers_stand_in_the_persons_entry_and_nowhere_in_what_is_trained_on(tmp_path):
    made = make(tmp_path / "text", *FLAGS)
    people = {name: [row["title"] for row in made[name]] for name in ("train", "register", "valid", "late")}
    assert [len(people[name]) for name in ("train", "valid", "late")] == [30, 6, 4]
    assert len({*people["train"], *people["valid"], *people["late"]}) == 40
    assert sorted(people["register"]) == sorted(people["train"] + people["valid"])
    trained = "".join(row["text"] for row in made["train"])
    for questions, entries in (("questions", "register"), ("late_questions", "late")):
        assert len(made[questions]) == 3 * len(people["valid" if questions == "questions" else "late"])
        texts = {row["title"]: row["text"] for row in made[entries]}
        for question in made[questions]:
            fact, name = question["id"].split(" of ")
            assert f" {fact} {question['answer']}." in texts[name]
            assert (
                name not in trained and question["prompt"].startswith(f"{name}?") and question["prompt"].endswith(fact)
            )
    # A text is its opening, as the prompts have it, and the facts in some order.
    verbs = ("Lives", "Works", "Keeps")
    orders = {tuple(word for word in row["text"].split() if word in verbs) for row in made["train"]}
    assert len(orders) == 6


def test_the_seed_alone_decides(tmp_path):
    first, again = make(tmp_path / "first", *FLAGS), make(tmp_path / "again", *FLAGS)
    assert first == again != make(tmp_path / "other", *FLAGS, "--seed=1")


def test_more_people_than_names_are_refused(tmp_path):
    line = error_line("tools/make_planted_text.py", f"--output={tmp_path}", "--people=200000")
    assert "are more than there are names, 90,000" in line
