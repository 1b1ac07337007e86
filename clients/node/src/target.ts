import { BlockList, isIP } from 'node:net'

const LOOPBACK = new BlockList()
LOOPBACK.addSubnet('127.0.0.0', 8, 'ipv4')
LOOPBACK.addAddress('::1', 'ipv6')

/** Whether every address of a gRPC target is on this machine, judged by its text alone. */
export function isLoopbackTarget(target: string): boolean {
  const scheme = /^([a-z0-9+.-]+):/i.exec(target)?.[1] ?? ''
  if (scheme === 'unix') return true
  let addresses = target
  if (scheme === 'dns' || scheme === 'ipv4' || scheme === 'ipv6') {
    // An authority is a DNS server, which can answer that localhost is anywhere.
    addresses = target.slice(scheme.length + 1).replace(/^\/\/\//, '')
  }
  return addresses.split(',').every(isLoopbackAddress)
}

function isLoopbackAddress(address: string): boolean {
  const [, bracketed, plain] = /^(?:\[([^\]]*)\]|([^:]*))(?::\d+)?$/.exec(address) ?? []
  const host = bracketed ?? plain ?? address
  if (host.toLowerCase() === 'localhost') return true
  const version = isIP(host)
  return version !== 0 && LOOPBACK.check(host, version === 4 ? 'ipv4' : 'ipv6')
}
