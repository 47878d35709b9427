"""One of several processes that load a file together: python read_shared.py FILE OUT ID COUNT PORT.

Prints a line of JSON: bytes of tensors read, and hashes of the shards that this process has.
"""

import hashlib
import json
import sys

import jax
import numpy as np


def main(path: str, out: str, process: int, count: int, port: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", count, process)
    from ltx2_jax.sharding import make_mesh
    from ltx2_jax.weights import export, mapping
    from ltx2_jax.weights.sources import open_release

    assert jax.device_count() == 2 * count
    mesh = make_mesh(2, 2, 1)
    with open_release(path) as release:
        config = release.config("transformer")
        wanted = release.parameters("transformer", config, mesh)
        found = list(release.stream("transformer", wanted))
        read = release.files[0].bytes_read
        shards = {
            ".".join(map(str, parameter.path)): [
                [str(shard.index), hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()]
                for shard in array.addressable_shards
            ]
            for parameter, array in found
        }
        # The same arrays out again, each process writing the rows of its devices.
        export_ = export.of_release(release)
        export_.streams["transformer"] = lambda: found
        export_.write(out)
    tree = mapping.tree(found)
    print(json.dumps({"read": read, "shards": shards, "leaves": len(jax.tree.leaves(tree))}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
