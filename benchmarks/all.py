"""Run every benchmark and collect their last lines in benchmarks/results.json."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Exit code 0 if all benchmarks ran; a failed one is named in the results."""
    results: dict[str, object] = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem == "all" or "__main__" not in path.read_text(encoding="utf-8"):
            continue  # what the benchmarks share has nothing to run
        print(f"== {path.stem}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{path.stem}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)  # noqa: S603  our own modules
        print(done.stdout, end="", flush=True)
        results[path.stem] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return int(any("failed" in result for result in results.values() if isinstance(result, dict)))


if __name__ == "__main__":
    sys.exit(main())
