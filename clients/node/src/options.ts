import type { ChannelCredentials, ChannelOptions } from '@grpc/grpc-js'

import { SERVICE_CONFIG } from './generated/service_config.js'
import { isLoopbackTarget } from './target.js'

const MIB = 1024 * 1024

/** A token, or a function that returns one or a promise of one. */
export type Token = string | (() => string | Promise<string>)

export interface ClientOptions {
  /** Sent as `x-tenant-id`. May be left out when the token or the certificate is for exactly one tenant. */
  tenant?: string | undefined
  /**
   * Sent as `authorization: Bearer`. A function is called for each call, so it should keep its
   * token until that is about to expire. What it throws, the call throws.
   */
  token?: Token | undefined
  /**
   * The credentials of the channel, such as `credentials.createSsl()`. Without them the connection
   * is plain text, and a token is sent to this machine only.
   */
  credentials?: ChannelCredentials | undefined
  /** The deadline of calls with one response that name no other. 10 seconds by default. */
  timeoutMs?: number | undefined
  /** Channel options of grpc-js. They override those of `channelOptions`. */
  options?: ChannelOptions | undefined
}

/** The channel options that suit the service: reads are retried, and a dead connection is noticed. */
export function channelOptions(target: string, options: ChannelOptions = {}): ChannelOptions {
  return {
    // With several addresses all are used, and when one fails the others.
    'grpc.service_config': JSON.stringify({ ...SERVICE_CONFIG, loadBalancingConfig: [{ round_robin: {} }] }),
    // A service config in DNS would replace this one.
    'grpc.service_config_disable_resolution': 1,
    // The server allows a ping every 20 seconds. A watch sends nothing but pings.
    'grpc.keepalive_time_ms': 30_000,
    'grpc.keepalive_timeout_ms': 10_000,
    // The default is two minutes, but a watch should resume soon after a long outage.
    'grpc.max_reconnect_backoff_ms': 10_000,
    // The limit of the server, which sends no more than 3 MiB itself.
    'grpc.max_send_message_length': 4 * MIB,
    'grpc.max_receive_message_length': 4 * MIB,
    // A proxy between this machine and itself would see the token.
    ...(isLoopbackTarget(target) ? { 'grpc.enable_http_proxy': 0 } : {}),
    ...options,
  }
}
