"""Training through the official OpenAI client: files, jobs, events, checkpoints, graders."""

import io
import json
import time

import openai
import pytest
from conftest import ADMIN_KEY
from test_openai import post

GRADER = {"type": "string_check", "name": "has e", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "like"}


def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=ADMIN_KEY, max_retries=0)


def lines(*items):
    return io.BytesIO("\n".join(json.dumps(item) for item in items).encode())


def upload(c, *items):
    return c.files.create(file=("train.jsonl", lines(*items)), purpose="fine-tune")


def test_files(tiny):
    c = client(tiny)
    file = upload(c, {"prompt": "The fox", "answer": "e"}, {"prompt": "Once", "answer": "e"})
    assert file.object == "file" and file.status == "processed" and file.purpose == "fine-tune"
    assert c.files.retrieve(file.id).bytes == file.bytes
    assert file.id in [f.id for f in c.files.list()]
    assert json.loads(c.files.content(file.id).read().splitlines()[1]) == {"prompt": "Once", "answer": "e"}
    assert c.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        c.files.retrieve(file.id)
    assert gone.value.code == "file_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        c.files.create(file=("bad.jsonl", io.BytesIO(b'{"prompt": "a"}\n{"prompt":')), purpose="fine-tune")
    assert bad.value.param == "file" and "line 2" in bad.value.message


def wait(c, job, *until):
    deadline = time.monotonic() + 120
    while (job := c.fine_tuning.jobs.retrieve(job.id)).status not in until:
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return job


@pytest.mark.parametrize("kind", ["reinforcement", "supervised"])
def test_fine_tuning(tiny, kind):
    c = client(tiny)
    file = upload(c, *({"prompt": f"The {n} foxes", "completion": " ate", "answer": "e"} for n in range(4)))
    own = {"hyperparameters": {"n_epochs": 1, "batch_size": 2, "max_completion_tokens": 8}}
    if kind == "reinforcement":
        own |= {"grader": GRADER}
        own["hyperparameters"] |= {"flat_reward_steps": 0}
    try:
        job = c.fine_tuning.jobs.create(
            model="tiny", training_file=file.id, validation_file=file.id, suffix="client", seed=3,
            method={"type": kind, kind: own}, metadata={"who": "me"})
    except openai.BadRequestError as error:
        if "needs a gradient" in error.message:
            pytest.skip("this build has no gradient")
        raise
    assert job.object == "fine_tuning.job" and job.model == "tiny" and job.training_file == file.id and job.seed == 3
    assert job.id in [j.id for j in c.fine_tuning.jobs.list()]
    job = wait(c, job, "succeeded", "failed")
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model.startswith("client-") and job.trained_tokens > 0 and job.finished_at
    answer = c.completions.create(model=job.fine_tuned_model, prompt="The", max_tokens=2)
    assert answer.choices[0].finish_reason
    events = list(c.fine_tuning.jobs.list_events(job.id, limit=2))  # the client turns the pages
    assert [e.type for e in events].count("metrics") == 2 and len({e.id for e in events}) == len(events)
    checkpoints = list(c.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints[0].step_number == 2 and checkpoints[0].fine_tuning_job_id == job.id
    c.completions.create(model=checkpoints[0].fine_tuned_model_checkpoint, prompt="The", max_tokens=1)
    with pytest.raises(openai.ConflictError):
        c.fine_tuning.jobs.cancel(job.id)


def test_pause_resume_cancel(tiny):
    c = client(tiny)
    body = {
        "name": "evolved", "method": "es", "dataset": [{"prompt": "The fox"}], "grader": {"type": "string_check", "reference": "e", "operation": "like"},
        "hyperparameters": {"steps": 10000, "prompts_per_step": 1, "population": 4, "max_completion_tokens": 4, "flat_reward_steps": 0},
    }
    raw = post(tiny, "/adapters/train", json.dumps(body).encode())
    job = c.fine_tuning.jobs.retrieve(raw["id"])
    assert c.fine_tuning.jobs.pause(job.id).status == "paused"
    assert c.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    assert c.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert c.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None
    with pytest.raises(openai.NotFoundError) as unknown:
        c.fine_tuning.jobs.retrieve("ftjob-" + 32 * "0")
    assert unknown.value.code == "job_not_found"


def test_graders(tiny):
    graders = client(tiny).fine_tuning.alpha.graders
    ran = graders.run(grader=GRADER, item={"answer": "e"}, model_sample="the end")
    assert ran.reward == 1.0 and ran.metadata.type == "string_check"
    assert graders.validate(grader=GRADER).grader
    with pytest.raises(openai.BadRequestError) as bad:
        graders.validate(grader={**GRADER, "operation": "equals"})
    assert bad.value.param.startswith("grader")
