"""Generate the tables of README.md, docs/ and benchmarks/README.md from results/.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ELEMENTS_OF_AN_IMAGE = 224 * 224 * 3
SHARE_HEADER = "of the limit | IQR"
MEASURED_HEADER = f"{SHARE_HEADER} | MiB planned | peak use"
MEASURED_RULE = "---:|---:|---:|---:|"
CHECKOUT = Path(__file__).parents[1]
DOCUMENTS = (
    CHECKOUT / "README.md",
    *sorted((CHECKOUT / "docs").glob("*.md")),
    CHECKOUT / "benchmarks" / "README.md",
)

MISMATCH_NOTE = (
    "Mismatches are values whose bits are not those of Keras' NumPy path or, after restoring, of "
    "the original image."
)
OVERVIEW_NOTE = (
    "Each library in its fastest configuration for each task, in new or in reused memory, and the "
    "largest share of mismatches among them, including restoring from float16. Blank: not "
    "applicable or not measured."
)
README_LIBRARIES = ("fastvgg", "Keras", "PyTorch", "OpenCV", "torchvision v2", "Albumentations")
OVERVIEW_TASKS = ("preprocess, caffe", "preprocess, torch", "restore, caffe")
OVERVIEW_FACTS = ("mismatches", "inverse", "`out=`", "datasets on disk")

# The peers of a library and, by its documentation: whether it provides the inverse, whether it
# supports out=, and what it does with a dataset on disk.
LIBRARIES = {
    "fastvgg": (("fastvgg",), "yes", "yes", "disk to disk, resumable"),
    "Keras": (
        ("Keras", "Keras on PyTorch", "Keras on JAX", "Keras on TensorFlow"),
        "no",
        "floats in place",
        "reads",
    ),
    "OpenCV": (
        ("OpenCV blobFromImages, NCHW", "OpenCV blobFromImages, NHWC", "OpenCV arithmetic"),
        *("", "yes", ""),
    ),
    "Albumentations": (("Albumentations Normalize",), "no", "no", ""),
    "torchvision v2": (("torchvision v2",), "no", "floats in place", "reads"),
    "PyTorch": (("PyTorch", "torch.compile"), "", "yes", "reads"),
    "JAX": (("JAX jit",), "", "no", ""),
    "DALI": (("DALI",), "", "", "reads"),
    "numexpr": (("numexpr",), "", "yes", ""),
    "Dask array": (("Dask array",), "", "yes", "disk to disk"),
    "Numba": (("Numba, plain prange loop",), "", "yes", ""),
    "NumPy": (("NumPy",), "", "yes", ""),
    "StackOverflow": (
        ("deprocess_img (StackOverflow)", "restore_original_image_from_array (StackOverflow)"),
        *("only", "no", ""),
    ),
}


def environment(record):
    """Return the machine, versions and date of a record, in one line."""
    machine = record["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    threads = f" {record['threads']} threads," if "threads" in record else ""
    return f"{machine['processor']},{threads} {machine['system']}, {packages}, {machine['date']}."


def share(row):
    """Return two columns: the share of the limit and its interquartile range."""
    low, high = row["spread"]
    return f"{row['share']:.2f} | {low:.2f} to {high:.2f}"


def bench(*records):
    """Return a table per instruction set: the shares of the limit by kernel and layouts."""
    lines = []
    for record in records:
        lines += ["", f"{record['instruction_set']}: {environment(record)}", ""]
        lines += ["| memory | GB/s |", "|---|---:|"]
        lines += [f"| {row['loop']} | {row['gigabytes_per_second']} |" for row in record["memory"]]
        lines += ["", *shares_by_layout(record["kernels"]), ""]
        lines.append(f"Overhead per call: {record['call_overhead_us']:.0f} microseconds.")
    return lines[1:]


LAYOUTS = ("NHWC", "NHWC-NCHW", "NCHW-NHWC", "NCHW")


def shares_by_layout(rows):
    """Return a table of shares of the limit: rows are types and mode, columns are layouts."""
    shares, images = {}, {}
    for row in rows:
        types, mode, layouts = row["path"].split(" ", 2)
        layout, _, memory = layouts.partition(" ")
        layout = layout.removesuffix(",")
        name = f"{types}, {mode}" + (f", {memory}" if memory else "")
        shares.setdefault(name, {})[layout] = f"{row['share']:.2f}"
        images.setdefault(name, {})[layout] = f"{row['images_per_second']:,}"
    lines = [f"| of the limit | {' | '.join(LAYOUTS)} | images/s, NHWC |", "|---|" + "---:|" * 5]
    for name, by_layout in shares.items():
        cells = [by_layout.get(layout, "") for layout in LAYOUTS]
        lines.append(f"| {name} | {' | '.join(cells)} | {images[name].get('NHWC', '')} |")
    return lines


def startup(record):
    """Return a table of startup time and installed size."""
    lines = ["| what | median | IQR |", "|---|---:|---:|"]
    for rows, unit in ((record["seconds"], " s"), (record["ratios"], "")):
        for row in rows:
            low, high = row["middle_half"]
            lines.append(
                f"| {row['what']} | {row['median']:.2f}{unit} | {low:.2f} to {high:.2f}{unit} |"
            )
    installed = (
        f"The core install is {record['packages']} packages, {record['bytes'] / 2**20:.0f} MiB."
    )
    return [*lines, "", f"{installed} Python {record['python']}, {environment(record)}"]


def peers(record):
    """Return a table for each task: the faster style of each peer, in reused and new memory."""
    rows = [row for row in record["rows"] if row["best"]]
    elements = record["images"] * ELEMENTS_OF_AN_IMAGE
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        by_name = {}
        for row in rows:
            if row["task"] == task:
                by_name.setdefault(row["contender"], {})[row["memory"]] = row
        lines += [
            f"| {task} | images/s in reused memory | in new memory | mismatches |",
            "|---|---:|---:|---:|",
        ]
        ranked = sorted(by_name.items(), key=lambda item: -fastest(item[1]))
        for name, by_memory in ranked:
            figures = [
                f"{by_memory[memory]['images_per_second']:,}" if memory in by_memory else ""
                for memory in ("reused", "new")
            ]
            differing = max(row["differing"] for row in by_memory.values()) / elements
            lines.append(f"| {name} | {figures[0]} | {figures[1]} | {percent(differing)} |")
        lines.append("")
    lines.append(f"{MISMATCH_NOTE}\n")
    lines += [f"- {name}: {note}." for name, note in record["notes"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in record["peers"].items())
    missing = "".join(f" Not measured: {name}." for name in record["not_measured"])
    return [*lines, "", f"{environment(record)} {versions}.{missing}"]


def fastest(by_memory):
    """Return the images per second of a peer in its faster kind of memory."""
    return max(rate(row) for row in by_memory.values())


def percent(share):
    """Return a share in percent; only exact values are shown as 0 or 100%."""
    if share == 0:
        return "0"
    if share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.1%}" if share < 0.1 or 0.99 < share < 1 else f"{share:.0%}"


def overview(record):
    """Return a row for each library: its fastest configurations and its worst mismatches."""
    lines = [
        f"| images/s | {' | '.join((*OVERVIEW_TASKS, *OVERVIEW_FACTS))} |",
        f"|---|{'---:|' * (len(OVERVIEW_TASKS) + 1)}{'---|' * (len(OVERVIEW_FACTS) - 1)}",
    ]
    for library, cells in libraries(record).items():
        _, *facts = LIBRARIES[library]
        lines.append(f"| {' | '.join((library, *cells, *facts))} |")
    return [*lines, "", f"{OVERVIEW_NOTE} {MISMATCH_NOTE}"]


def comparison(record):
    """Return the rows of the overview for the README, without the facts."""
    lines = [
        f"| images/s | {' | '.join((*OVERVIEW_TASKS, OVERVIEW_FACTS[0]))} |",
        f"|---|{'---:|' * (len(OVERVIEW_TASKS) + 1)}",
    ]
    cells = libraries(record)
    lines += [f"| {' | '.join((name, *cells[name]))} |" for name in README_LIBRARIES]
    machine = record["machine"]
    threads = f"{record['threads']} threads"
    return [*lines, "", f"{MISMATCH_NOTE} {machine['processor']}, {threads}, {machine['date']}."]


def libraries(record):
    """Return for each library its images per second in each task, and its worst mismatches."""
    fastest_rows = {}
    for row in record["rows"]:
        key = row["contender"], row["task"]
        fastest_rows[key] = max(fastest_rows.get(key, row), row, key=rate)
    cells = {}
    for library, (names, *_) in LIBRARIES.items():
        by_task = {}
        for (peer, task), row in fastest_rows.items():
            if peer in names:
                by_task[task] = max(by_task.get(task, row), row, key=rate)
        if by_task:
            rates = [
                f"{rate(by_task[task]):,}" if task in by_task else "" for task in OVERVIEW_TASKS
            ]
            differing = max(row["differing"] for row in by_task.values())
            share = percent(differing / (record["images"] * ELEMENTS_OF_AN_IMAGE))
            cells[library] = [*rates, share]
    return cells


def rate(row):
    """Return the images per second of a row."""
    return row["images_per_second"]


def streams(record):
    """Return a table of shares of the disk's limit and one of memory."""
    lines = [
        "| path | GB/s | of the limit | IQR |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['path']} | {row['gigabytes_per_second']:.2f} | {share(row)} |"
        for row in record["rows"]
    ]
    lines += [
        "",
        "| memory | planned, MiB | peak use, MiB | peak page tables, MiB |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['path']} | {row['planned_mib']:.0f} | {row['peak_mib']:.0f} "
        f"| {row['page_tables_mib']:.1f} |"
        for row in record["memory"]
    ]
    return [*lines, "", environment(record)]


def images(record):
    """Return a table of shares of the limit and one of speedups."""
    lines = [*shares_table(record["rows"]), "", *times_table(record["times"])]
    versions = "".join(f", {name} {version}" for name, version in record["peers"].items())
    missing = "".join(f" Not measured: {name}: {why}." for name, why in missing_peers(record))
    dataset = (
        f"{record['images']:,} photographs of {record['kilobytes_of_a_file']:.0f} kB on average; "
        f"for fast_jpeg {record['large_images']:,}."
    )
    return [*lines, "", f"{dataset} {environment(record).removesuffix('.')}{versions}.{missing}"]


def shares_table(rows):
    """Return a table of images per second and their limit."""
    lines = [
        "| path | images/s | limit, images/s | of the limit | IQR |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['path']} | {row['images_per_second']:,} | {row['limit_images_per_second']:,} "
        f"| {share(row)} |"
        for row in rows
    ]
    return lines


def times_table(rows):
    """Return a table of speedups."""
    lines = [
        "| against | images/s | its images/s | times as fast | IQR |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["spread"]
        lines.append(
            f"| {row['path']} | {row['images_per_second']:,} | {row['other_images_per_second']:,} "
            f"| {row['times']:.2f} | {low:.2f} to {high:.2f} |"
        )
    return lines


def missing_peers(record):
    """Return the peers that were not measured, and why."""
    return [(name, why.rstrip(".")) for name, why in record["not_measured"].items()]


def images_million(record):
    """Return a table of speed and memory of a million images, against ten thousand."""
    lines = [
        "| path | images | images/s | relative time per image | peak memory, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        for count, rate, time, memory in (
            (row["few_images"], row["few_images_per_second"], 1, row["few_peak_mib"]),
            (row["images"], row["images_per_second"], row["time_of_an_image"], row["peak_mib"]),
        ):
            lines.append(f"| {row['path']} | {count:,} | {rate:,} | {time:.2f} | {memory:.0f} |")
    return [*lines, "", environment(record)]


def images_planning(record):
    """Return a table of the time and memory of planning."""
    lines = [
        "| planning | files | seconds | range | peak memory, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        minimum, maximum = row["least_and_most_seconds"]
        lines.append(
            f"| {row['path']} | {row['files']:,} | {row['seconds']:.1f} "
            f"| {minimum:.1f} to {maximum:.1f} | {row['peak_mib']:.0f} |"
        )
    return [*lines, "", environment(record)]


def loading(record):
    """Return a table of batches against the kernel only and one of speedups."""
    lines = [*shares_table(record["rows"]), "", *times_table(record["times"])]
    versions = "".join(f", {name} {version}" for name, version in record["peers"].items())
    dataset = f"{record['images']:,} images in batches of {record['batch']}."
    return [*lines, "", f"{dataset} {environment(record).removesuffix('.')}{versions}."]


def cluster(record):
    """Return tables of two workers, of sizes, and of empty chunks."""
    lines = [
        "| two workers | GB/s read | in one process | share | IQR | MiB planned | used |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        path = row["path"].removeprefix("two workers, ")
        lines.append(
            f"| {path} | {row['gigabytes_per_second']:.2f} "
            f"| {row['alone_gigabytes_per_second']:.2f} | {share(row)} "
            f"| {row['planned_mib']:.0f} | {row['peak_mib']:.0f} |"
        )
    lines += [
        "",
        "| `.npy` of float32 on disk | seconds | IQR | residual |",
        "|---:|---:|---:|---:|",
    ]
    for row in record["sizes"]:
        low, high = row["middle_half"]
        lines.append(
            f"| {row['gib']:g} GiB | {row['seconds']:.2f} | {low:.2f} to {high:.2f} "
            f"| {row['deviation']:+.1%} |"
        )
    lines += [
        "",
        "| empty chunks | threads | ms per chunk | scheduler, ms | its MiB | coordinator, MiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['chunks']:,} | {row['threads']} | {row['ms']:.2f} | {row['scheduler_ms']:.2f} "
        f"| {row['scheduler_mib']:,} | {row['coordinator_mib']:,} |"
        for row in record["chunks"]
    ]
    return [*lines, "", environment(record)]


def growth(record):
    """Return four tables: images, their size, threads and chunks."""
    sweeps, line = record["sweeps"], record["line"]
    side = sweeps["images"][0]["side"]
    lines = [
        f"| images of {side}x{side} | seconds | us per image | residual | {MEASURED_HEADER} |",
        f"|---:|---:|---:|---:|{MEASURED_RULE}",
    ]
    lines += [
        f"| {row['images']:,} | {row['seconds']:.3f} | {row['seconds'] / row['images'] * 1e6:.1f} "
        f"| {row['deviation']:+.1%} | {share_and_memory(row)} |"
        for row in sweeps["images"]
    ]
    lines += [
        "",
        f"Linear fit: {line['start_ms']:.0f} ms + {line['microseconds_an_image']:.1f} us/image.",
        "",
        f"| images | size | GB/s written | {MEASURED_HEADER} |",
        f"|---:|---:|---:|{MEASURED_RULE}",
    ]
    lines += [
        f"| {row['images']:,} | {row['side']}x{row['side']} | {written_rate(row):.2f} "
        f"| {share_and_memory(row)} |"
        for row in sweeps["side"]
    ]
    lines += [
        "",
        f"| threads | in memory, GB/s | {SHARE_HEADER} | to disk, GB/s | {MEASURED_HEADER} |",
        f"|---:|---:|---:|---:|---:|{MEASURED_RULE}",
    ]
    lines += [
        f"| {row['threads']} | {written_rate(in_memory):.2f} | {share(in_memory)} "
        f"| {written_rate(row):.2f} | {share_and_memory(row)} |"
        for row, in_memory in zip(sweeps["threads"], record["in_memory"], strict=True)
    ]
    lines += [
        "",
        f"| memory limit, MiB | images per chunk | MiB per write | GB/s | {MEASURED_HEADER} |",
        f"|---:|---:|---:|---:|{MEASURED_RULE}",
    ]
    lines += [
        f"| {row['memory_limit_mib']:.0f} | {row['chunk_images']} | {row['chunk_mib']:.0f} "
        f"| {written_rate(row):.2f} | {share_and_memory(row)} |"
        for row in sweeps["chunk"]
    ]
    idle_mib = max(row["idle_mib"] for rows in sweeps.values() for row in rows)
    return [*lines, "", f"The idle process uses {idle_mib:.0f} MiB. {environment(record)}"]


def written_rate(row):
    """Return the gigabytes of the result per second."""
    return row["written_bytes"] / row["seconds"] / 1e9


def share_and_memory(row):
    """Return four columns: share of the limit, interquartile range, planned and peak memory."""
    above = ", above the plan" if row["peak_mib"] > row["planned_mib"] else ""
    return f"{share(row)} | {row['planned_mib']:.0f} | {row['peak_mib']:.0f}{above}"


def billion(record):
    """Return a table with a column for each plan."""
    rows = record["rows"]
    names = {
        "chunks": "shards",
        "tasks": "tasks",
        "terabytes_read": "TB read",
        "terabytes_written": "TB written",
        "requests": "requests",
        "machine_hours": "machine hours at full bandwidth",
        "machines_that_a_scheduler_feeds": "machines that one scheduler can keep busy",
        "machines_that_a_prefix_takes": "machines at the S3 request limit of one array",
        "hours_of_the_scheduler": "scheduler hours",
        "coordinator_mib": "coordinator memory, MiB",
        "chunks_that_fit_into_1_gib": "shards of a plan that fit a 1 GiB coordinator",
        "dollars_a_million_of_machines": "machines, $ per million images",
        "dollars_a_million_of_requests": "requests, $ per million images",
        "dollars_a_million_of_a_month": "storage of the result, $ per million images and month",
    }
    lines = [
        f"| a billion images | {' | '.join(row['path'] for row in rows)} |",
        f"|---|{'---:|' * len(rows)}",
    ]
    for key, name in names.items():
        lines.append(f"| {name} | {' | '.join(readable(row[key]) for row in rows)} |")
    return lines


def readable(figure):
    """Format a figure, or a dictionary of figures."""
    if isinstance(figure, dict):
        return ", ".join(f"{count / 1e6:,.0f} million {name}" for name, count in figure.items())
    return f"{figure:,.2f}" if isinstance(figure, float) else f"{figure:,}"


def inverses(record):
    """Return a table of the number of values that inverses get wrong."""
    types = list(record["rows"][0]["wrong"])
    lines = [
        f"| mode | wrong of {record['values']} values, by storage type | {' | '.join(types)} |",
        f"|---|---|{'---:|' * len(types)}",
    ]
    for row in record["rows"]:
        counts = " | ".join(str(row["wrong"][name]) for name in types)
        lines.append(f"| {row['mode']} | {row['inverse']} | {counts} |")
    return [*lines, "", environment(record)]


def campaigns(*records):
    """Return a table with a row for each campaign."""
    lines = ["| command | what it does | result of the last long run | date |", "|---|---|---|---|"]
    for (name, description), record in zip(CAMPAIGNS.items(), records, strict=True):
        counts = ", ".join(
            f"{count:,} {key}" for key, count in record["counts"].items() if not key.endswith(UNITS)
        )
        date = record["machine"]["date"]
        lines.append(f"| `python -m tests.campaigns.{name}` | {description} | {counts} | {date} |")
    return [*lines, "", f"The last of them ran on {environment(records[-1])}"]


UNITS = ("_us", "_kib")  # these are not counts
CAMPAIGNS = {
    "crash_states": "enumerates the states that a kill or a power failure can leave, including "
    "torn sectors and crashes during recovery, and runs fastvgg on them",
    "kills": "kills at every call that changes the disk, three levels deep",
    "random_kills": "sends SIGKILL at random times, to one process and to four concurrent ones",
    "power_cuts": "cuts the power of a real ext4 file system, also after a kill and during "
    "recovery",
    "cluster_kills": "kills workers and coordinators of a Dask cluster, and runs tasks twice "
    "concurrently",
    "failing_calls": "makes every system call fail, or do half of its work",
    "file_systems": "kills and resumes runs on every file system that the machine can mount",
    "changing_sources": "truncates, overwrites, replaces or removes files of a source that a run "
    "reads",
    "full_disks": "runs on disks of every size around the requirement",
    "fuzz": "corrupts headers, journals, redo logs and manifests",
    "fuzz_hdf5": "corrupts HDF5 files",
    "hostile_images": "mutates photographs in every format, and images that claim much memory, and "
    "checks the memory that reading them takes",
    "hostile_containers": "damages containers of arrays and images, and checks the memory that "
    "reading them takes",
    "installs": "builds the wheel and the source archive, and installs them on every available "
    "Python, with the lowest and the newest version of each dependency",
    "arm": "runs kernels on an emulated Arm processor and compares their bits with the NumPy "
    "reference",
}

# The function that generates a table, and the results that it reads.
TABLES = {
    "bench": (bench, sorted(path.stem for path in RESULTS.glob("bench-*.json"))),
    "comparison": (comparison, ["peers"]),
    "overview": (overview, ["peers"]),
    "startup": (startup, ["startup"]),
    "peers": (peers, ["peers"]),
    "inverses": (inverses, ["inverses"]),
    "campaigns": (campaigns, list(CAMPAIGNS)),
    "growth": (growth, ["growth"]),
    "streams": (streams, ["streams"]),
    "formats": (streams, ["formats"]),
    "images": (images, ["images"]),
    "images_million": (images_million, ["images_million"]),
    "images_planning": (images_planning, ["images_planning"]),
    "loading": (loading, ["loading"]),
    "cluster": (cluster, ["cluster"]),
    "billion": (billion, ["billion"]),
}


def read_record(name):
    """Return the record of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def with_tables(documents):
    """Return the texts of documents with regenerated tables; each table occurs exactly once."""
    for name, (table, results) in TABLES.items():
        text = "\n".join(table(*map(read_record, results))) + "\n"
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)", re.DOTALL)
        replaced = [
            marked.subn(lambda m, t=text: m[1] + t + m[2], document) for document in documents
        ]
        if (count := sum(count for _, count in replaced)) != 1:
            raise SystemExit(
                f"found {count} places for the table {name!r} instead of one: put it between "
                f"the lines <!-- table: {name} --> and <!-- end of table -->"
            )
        documents = [document for document, _ in replaced]
    return documents


def main():
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    for document, text in zip(DOCUMENTS, with_tables(texts), strict=True):
        document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
