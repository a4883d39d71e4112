"""What a node needs of the kernel: a bridge for pods and forwarding; and how all of it is taken back."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

from tests.cluster.layout import BRIDGE, POD_NETWORK, Layout
from tests.cluster.processes import run, succeeds
from tests.cluster.report import ClusterError

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
CHAINS_OF_OURS = ("KUBE-", "CNI-")
"""How kube-proxy, kubelet and the CNI plugins begin the names of their chains."""
TABLES = ("nat", "filter", "mangle", "raw")
CNI_NETWORK = "stagecoach"
CNI_RESULTS = Path("/var/lib/cni/results")
DEFAULT_MTU = 1500


def set_up(layout: Layout) -> None:
    """Make the bridge with its address, and let the kernel forward.

    Raises ClusterError on a machine that is a node already: taking our chains back would take that node's too.
    """
    FORWARDING.write_text("1")
    if not succeeds(["ip", "link", "show", BRIDGE]):
        if any(removals(list_rules("iptables", table)) for table in TABLES):
            raise ClusterError("this machine has chains of Kubernetes or CNI: it is another cluster's node already")
        run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        run(["ip", "address", "add", f"{layout.address}/{POD_NETWORK.prefixlen}", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])


def tear_down() -> None:
    """Remove the bridge, the chains and what is remembered of pods' addresses."""
    if succeeds(["ip", "link", "show", BRIDGE]):
        run(["ip", "link", "delete", BRIDGE])
    for program in ("iptables", "ip6tables"):
        if shutil.which(program):
            for table in TABLES:
                remove_chains(program, table)
    remove_cni_results()


def remove_chains(program: str, table: str) -> None:
    """Remove the chains of Kubernetes and CNI from a table, with the rules that lead to them."""
    for change in removals(list_rules(program, table)):
        run([program, "--wait", "--table", table, *change])


def list_rules(program: str, table: str) -> list[str]:
    """Return the rules of a table as the command would make them; none where the kernel lacks the table."""
    command = [program, "--wait", "--table", table, "--list-rules"]
    return run(command).splitlines() if succeeds(command) else []


def removals(rules: list[str]) -> list[list[str]]:
    """Return the arguments that remove our chains, given a table's rules as `iptables --list-rules` prints them.

    First the rules of others' chains that jump into ours, then our chains' own rules, then the chains.
    """
    chains = [name for name in (rule.split()[1] for rule in rules if rule.startswith("-N ")) if _is_ours(name)]
    changes = []
    for rule in rules:
        words = shlex.split(rule)
        if words[0] == "-A" and not _is_ours(words[1]) and "-j" in words and _is_ours(words[words.index("-j") + 1]):
            changes.append(["-D", *words[1:]])
    return [*changes, *(["-F", chain] for chain in chains), *(["-X", chain] for chain in chains)]


def remove_cni_results() -> None:
    """Remove what libcni remembers of our network's pods."""
    for file in CNI_RESULTS.glob(f"{CNI_NETWORK}-*"):
        file.unlink()


def smallest_mtu() -> int:
    """Return the largest packet, in bytes, that all of the machine's links can carry; `ip` lists those down as {}."""
    links = json.loads(run(["ip", "-json", "link", "show", "up"]))
    return min((link["mtu"] for link in links if link.get("link_type") == "ether"), default=DEFAULT_MTU)


def _is_ours(chain: str) -> bool:
    return chain.startswith(CHAINS_OF_OURS)
