"""A fake of the trainer's launcher: follows a script file, and leaves the same files as the real one.

    python fake_launcher.py FOLDER

FOLDER/script.json: by stage, a list with an entry for each attempt (the last one is used for all later attempts):
`seconds` to work, `exit` code, `message`, `fault` and `lastStep` of its result, `kill` (dies by SIGKILL), `silent`
(leaves no result), `stubborn` (ignores SIGTERM), `child` (starts a process in its own session that outlives it),
`waitFor` (a stage that must have started), `tokens`, `metrics`, `report`, `random` (its output differs every time).
FOLDER/events.jsonl: events, one line each.

Imports only the standard library, because a test starts it a dozen times.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(sys.argv[1])
STAGE = json.loads(Path(os.environ["STAGECOACH_STAGE_FILE"]).read_bytes())
INTERRUPTED = 75


def tell(event: str, **more: object) -> None:
    line = {"event": event, "stage": STAGE["stage"], "attempt": STAGE["attempt"], "time": time.time(), **more}
    with (HERE / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def events() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / "events.jsonl").read_text().splitlines()]


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def leave(code: int, cause: str | None, **more: object) -> NoReturn:
    result = Path(os.environ["STAGECOACH_RESULT_FILE"])
    temporary = result.with_suffix(".tmp")
    temporary.write_text(json.dumps({"exitCode": code, "cause": cause, **more}))
    temporary.replace(result)
    tell("end", code=code)
    sys.stdout.flush()
    os._exit(code)


def stop(*_: object) -> NoReturn:
    leave(INTERRUPTED, "preemption", message="stopped", lastStep=3)


def watch_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def progress(done: float, total: float) -> None:
    event = {
        "time": time.time(),
        "activity": "train",
        "done": done,
        "total": total,
        "unit": "tokens",
        "metrics": {"loss": 3.21},
    }
    with Path(os.environ["STAGECOACH_PROGRESS_FILE"]).open("a") as file:
        file.write(json.dumps(event) + "\n")


def work(seconds: float) -> None:
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        progress(passed, seconds)
        time.sleep(0.02)


def publish(script: dict[str, Any]) -> str:
    files = {"model.txt": f"made by {STAGE['kind']} from {STAGE['digest']}\n".encode()}
    if script.get("random"):
        files["noise.txt"] = os.urandom(8).hex().encode()
    if "report" in script:
        files["report.json"] = canonical(script["report"])
    root = Path(STAGE["storageUri"].removeprefix("file://")) / "artifacts" / STAGE["digest"]
    objects: list[dict[str, Any]] = []
    for name, data in files.items():
        (root / "output").mkdir(parents=True, exist_ok=True)
        (root / "output" / name).write_bytes(data)
        objects.append({"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    content_digest = hashlib.sha256(canonical(sorted(list(item.values()) for item in objects))).hexdigest()
    manifest = {
        "stageDigest": STAGE["digest"],
        "contentDigest": content_digest,
        "kind": STAGE["kind"],
        "objects": objects,
        "parents": [
            {"key": key, "digest": item["digest"], "stageDigest": item["stageDigest"], "uri": item["uri"]}
            for key, item in sorted(STAGE["inputs"].items())
        ],
        "config": STAGE["config"],
        "code": STAGE["code"],
        "seed": STAGE["seed"],
        "tokens": script.get("tokens", 0),
        "seconds": 12.5,
        "metrics": script.get("metrics", {}),
        "created": time.time(),
    }
    temporary = root / "manifest.tmp"
    temporary.write_bytes(canonical(manifest))
    try:
        os.link(temporary, root / "manifest.json")
    except FileExistsError:
        return str(json.loads((root / "manifest.json").read_bytes())["contentDigest"])
    return content_digest


def main() -> None:
    scripts = json.loads((HERE / "script.json").read_bytes()).get(STAGE["stage"], [{}])
    script = scripts[min(STAGE["attempt"], len(scripts)) - 1]
    tell("start", pid=os.getpid(), ranks=STAGE["ranksPerNode"], threads=os.environ["STAGECOACH_THREADS"])
    print(f"working on {STAGE['stage']}", flush=True)
    if script.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, stop)
        threading.Thread(target=watch_stdin, daemon=True).start()
    if script.get("child"):
        child = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True, stdin=subprocess.DEVNULL)
        tell("child", pid=child.pid)
    deadline = time.monotonic() + 20
    while "waitFor" in script and script["waitFor"] not in {item["stage"] for item in events()}:
        if time.monotonic() > deadline:
            leave(64, "user", message=f"{script['waitFor']} did not start")
        time.sleep(0.01)
    work(script.get("seconds", 0.0))
    if script.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if script.get("silent"):
        print("Traceback: something broke", flush=True)
        tell("end", code=script["exit"])
        os._exit(script["exit"])
    code = script.get("exit", 0)
    if code:
        cause = {64: "user", 65: "user", 66: "user", 79: "hang"}.get(code, "infrastructure")
        more = {name: script[name] for name in ("fault", "lastStep") if name in script}
        leave(code, cause, message=script.get("message", "it broke"), **more)
    leave(0, None, contentDigest=publish(script))


main()
