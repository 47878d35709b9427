#!/usr/bin/env python3
"""Prints a JobSet of a training for GKE: python launch/jobset.py --help.

A JobSet (https://jobset.sigs.k8s.io) starts all pods of all slices together, and again together
when one is lost. It needs the JobSet controller in the cluster, and an image with this package:

    FROM python:3.12
    COPY . /ltx2_jax
    RUN pip install '/ltx2_jax[tpu,gcs]'
    WORKDIR /ltx2_jax
"""

import argparse
import math
import sys
from collections.abc import Sequence

EPILOG = """\
example:
  python launch/jobset.py my-run --slice=v5p:4x4x4 --image=us-docker.pkg.dev/my/ltx2_jax \\
      -- --config=configs/ltx2_19b.py --config.workdir=gs://my-bucket/my-run | kubectl apply -f -
"""

# Of a chip's name as `plan --topology` has it: the node label, and chips of a host.
CHIPS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
    "tpu7x": ("tpu7x", 4),
}
# Exit codes of a training after which starting it again is of no use.
MISTAKE, DIVERGED = 2, 3


def jobset(args: argparse.Namespace) -> str:
    """The JobSet as YAML."""
    chip, topology = args.slice
    label, chips = CHIPS[chip]
    total = math.prod(map(int, topology.split("x")))
    hosts, on_host = max(total // chips, 1), min(total, chips)
    flags = "".join(f"\n                    - {quoted(flag)}" for flag in args.flags)
    return f"""\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {args.name}
  annotations:
    # A slice is a node pool: no two jobs share one.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {args.restarts}
    rules:
      # A mistake or a run that diverged (see podFailurePolicy) does not get better by trying again.
      - name: mistakeOrDiverged  # letters and digits: a JobSet takes no hyphens here
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: {args.slices}
      template:
        spec:
          completionMode: Indexed
          parallelism: {hosts}
          completions: {hosts}
          backoffLimit: 0  # the whole JobSet is started again, not one pod
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [{MISTAKE}, {DIVERGED}]
          template:
            spec:
              restartPolicy: Never  # which podFailurePolicy asks for
              terminationGracePeriodSeconds: {args.grace}  # to finish the step and save
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {label}
                cloud.google.com/gke-tpu-topology: {topology}
              containers:
                - name: train
                  image: {quoted(args.image)}
                  ports:
                    - containerPort: 8471  # between the hosts of a slice
                    - containerPort: 8080  # between slices
                  command:
                    - python
                    - -m
                    - ltx2_jax.train
                  args:{flags}
                  resources:
                    limits:
                      google.com/tpu: {on_host}
"""


def quoted(text: str) -> str:
    """A YAML scalar in single quotes, which says what stands in it."""
    return "'" + text.replace("'", "''") + "'"


def tpu_slice(text: str) -> tuple[str, str]:
    """ "v5p:4x4x4", for the `type` of an argument."""
    chip, _, topology = text.partition(":")
    if chip not in CHIPS:
        raise argparse.ArgumentTypeError(f"{text!r}: the chips are {', '.join(CHIPS)}")
    sizes = topology.split("x")
    flat = chip in ("v5e", "v6e")
    if len(sizes) != (2 if flat else 3) or not all(s.isdecimal() and int(s) for s in sizes):
        example = "4x4" if flat else "2x2x1"
        raise argparse.ArgumentTypeError(f"{text!r}: a slice of {chip} is like {chip}:{example}")
    return chip, topology


def name(text: str) -> str:
    """A name that Kubernetes takes, for the `type` of an argument."""
    letters = text.replace("-", "a")
    if not (letters.isascii() and letters.isalnum() and text == text.lower() and text[0].isalpha()):
        raise argparse.ArgumentTypeError(f"{text!r}: use small letters, digits and dashes")
    return text


def count(text: str) -> int:
    """A whole number above 0, for the `type` of an argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the JobSet of the arguments; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Print a JobSet of a training, for kubectl apply.",
        usage="%(prog)s NAME --slice=CHIP:TOPOLOGY --image=IMAGE [options] -- FLAGS",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", metavar="NAME", type=name, help="of the JobSet")
    add(
        "--slice",
        type=tpu_slice,
        required=True,
        help="such as v5p:4x4x4, as plan --topology has it",
    )
    add("--slices", type=count, default=1, metavar="N", help="so many of them (default: 1)")
    add("--image", required=True, help="with this package in its folder")
    add("--restarts", type=count, default=1000, metavar="N", help="at most (default: 1000)")
    add(
        "--grace",
        type=count,
        default=300,
        metavar="SECONDS",
        help="to save in when a pod has to go (default: 300)",
    )
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    args.flags = words[split + 1 :]
    if not args.flags:
        parser.error("the flags of the training come after --, such as -- --config=FILE.py")
    print(jobset(args), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
