"""Which rows of a batch every host of a slice reads: no program is compiled for it.

A host is a block of the torus of chips, and the batch follows the mesh along the torus, so that the
rows of a host lie apart. What is said here is what `train` asks on the slice itself, of the mesh
that it makes there.
"""

from collections.abc import Sequence
from typing import Any

from ltx2_jax.config import Config
from ltx2_jax.hosts import rows_of_host
from ltx2_jax.planning.changes import mesh_of, sizes_of
from ltx2_jax.planning.programs import check
from ltx2_jax.planning.topology import slice_of, tpu_devices
from ltx2_jax.sampling.programs import Request
from ltx2_jax.sharding import make_mesh, sharding_of
from ltx2_jax.training import checks


def plan_hosts(config: Config, request: Request, topology: str) -> dict[str, Any]:
    """The rows of every host, and the hosts that hold some of the same.

    Raises:
      UserError: no such slice; a mesh that does not divide devices, batch, heads or tokens; no TPU
        compiler, which knows where the hosts are.
    """
    where, batch = slice_of(topology), config.data.batch_size
    checks.check_batch(config, mesh_of(config, where))
    check(config, request, mesh_of(config, where))
    devices = tpu_devices(topology)
    mesh = make_mesh(*sizes_of(config), slices=where.count, devices=devices)
    sharding = sharding_of(mesh, "batch")
    hosts = sorted({device.process_index for device in devices})
    rows = {host: rows_of_host(sharding, batch, host) for host in hosts}
    holders: dict[int, list[int]] = {}
    for host in hosts:
        for row in rows[host]:
            holders.setdefault(row, []).append(host)
    return {
        "what": "hosts",
        "topology": where.name,
        "devices": len(devices),
        "device_kind": where.chip.name,
        "split": {name: size for name, size in mesh.shape.items() if size > 1},
        "batch": batch,
        "fits": sorted(holders) == list(range(batch)) and all(rows.values()),
        "hosts": [
            {
                "host": host,
                "rows": list(rows[host]),
                "shares_with": sorted({h for row in rows[host] for h in holders[row]} - {host}),
            }
            for host in hosts
        ],
    }


def describe_hosts(facts: dict[str, Any]) -> str:
    """The facts of `plan_hosts` as a table."""
    hosts = facts["hosts"]
    split = ", ".join(f"{size:,} {axis}" for axis, size in facts["split"].items()) or "none"
    width = max(8, *(len(spans(host["rows"])) for host in hosts))
    verdict = "every host has rows, together all of the batch"
    return "\n".join([
        f"rows of {facts['batch']} clips a step on {facts['topology']} ({facts['devices']} x "
        f"{facts['device_kind']}, {len(hosts)} hosts)",
        f"  split          {split}",
        f"  host  {'rows':<{width}}  some of them also on hosts",
        *(
            f"  {host['host']:>4}  {spans(host['rows']):<{width}}  "
            f"{spans(host['shares_with']) or '-'}"
            for host in hosts
        ),
        f"  {verdict if facts['fits'] else 'rows are missing'}",
    ])  # fmt: skip


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: (0, 1, 2, 5) -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
