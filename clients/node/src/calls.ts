import { once } from 'node:events'

import {
  Client,
  Metadata,
  status,
  type ChannelCredentials,
  type ClientDuplexStream,
  type ServiceError,
} from '@grpc/grpc-js'
import type { BinaryWriter } from '@bufbuild/protobuf/wire'

import { ChatTicketError, fromServiceError } from './errors.js'
import { channelOptions, type ClientOptions } from './options.js'

interface MessageType<Message> {
  encode(message: Message): BinaryWriter
  decode(bytes: Uint8Array): Message
  fromPartial(partial: any): Message
}

interface Method {
  readonly name: string
  readonly requestType: MessageType<any>
  readonly responseType: MessageType<any>
  readonly requestStream: boolean
  readonly responseStream: boolean
}

/** A service as ts-proto describes it (`outputServices=generic-definitions`). */
export interface ServiceDefinition {
  readonly fullName: string
  readonly methods: Readonly<Record<string, Method>>
}

type RequestOf<M extends Method> = Parameters<M['requestType']['fromPartial']>[0]
type ResponseOf<M extends Method> = ReturnType<M['responseType']['decode']>

/** Options of one call. */
export interface CallOptions {
  /** Ends the call. It then rejects with the reason of the signal. */
  signal?: AbortSignal | undefined
  /**
   * The deadline, in milliseconds from now. By default that of the client for a call with one
   * response, and none for a stream.
   */
  timeoutMs?: number | undefined
  /** More metadata to send. */
  metadata?: Metadata | undefined
}

export type UnaryCall<Request, Response> = (request: Request, options?: CallOptions) => Promise<Response>
export type StreamCall<Request, Response> = (request: Request, options?: CallOptions) => AsyncGenerator<Response, void, void>
/** A stream of responses to a stream of requests. It ends the requests when it ends itself. */
export type DuplexCall<Request, Response> = StreamCall<AsyncIterable<Request> | Iterable<Request>, Response>

/** The methods of a service. Fields that a request leaves out have their default value. */
export type Calls<Service extends ServiceDefinition> = {
  readonly [Name in keyof Service['methods']]: Service['methods'][Name]['requestStream'] extends true
    ? DuplexCall<RequestOf<Service['methods'][Name]>, ResponseOf<Service['methods'][Name]>>
    : Service['methods'][Name]['responseStream'] extends true
    ? StreamCall<RequestOf<Service['methods'][Name]>, ResponseOf<Service['methods'][Name]>>
    : UnaryCall<RequestOf<Service['methods'][Name]>, ResponseOf<Service['methods'][Name]>>
}

interface Cancellable {
  cancel(): void
}

// A call beyond the server's limit of concurrent streams waits in its connection until another one
// ends, and a watch does not end. RFC 9113 recommends a limit of at least 100, which many proxies
// have. So half of them are left for calls with one response.
const STREAMS_PER_CHANNEL = 50

const MAX_TIMER_MS = 2 ** 31 - 1

interface Channel {
  readonly client: Client
  streams: number
}

const unaryMethods = new WeakMap<object, string>()

/** The name of the type of a method's request, when it is one of a client with one response. */
export const requestTypeOf = (method: object): string | undefined => unaryMethods.get(method)

/**
 * The channels to the service, with the identity of their caller.
 *
 * The first channel has all calls with one response, and streams up to STREAMS_PER_CHANNEL. Each
 * further channel has as many streams.
 */
export class Connection {
  readonly #channels: Channel[] = []
  readonly #first: Channel
  readonly #open: () => Channel
  readonly timeoutMs: number
  readonly #token: ClientOptions['token']
  readonly #tenant: string | undefined
  readonly #running = new Set<Cancellable>()
  readonly #closing = new AbortController()

  constructor(target: string, credentials: ChannelCredentials, options: ClientOptions) {
    this.#tenant = options.tenant === undefined ? undefined : sendable('tenant', options.tenant)
    this.#token = typeof options.token === 'string' ? sendable('token', options.token) : options.token
    this.timeoutMs = options.timeoutMs ?? 10_000
    // Channels with equal options would otherwise share one connection, and its limit of streams.
    const own = { 'grpc.use_local_subchannel_pool': 1, ...options.options }
    this.#open = () => {
      const channel = { client: new Client(target, credentials, channelOptions(target, own)), streams: 0 }
      this.#channels.push(channel)
      return channel
    }
    this.#first = this.#open()
  }

  /** Whether an expired token can be replaced by a new one. */
  get renewsToken(): boolean {
    return typeof this.#token === 'function'
  }

  /** Aborted by `close`. */
  get closing(): AbortSignal {
    return this.#closing.signal
  }

  /** Ends all calls and closes the connections. */
  close(): void {
    this.#closing.abort(new Error('the client is closed'))
    for (const call of this.#running) call.cancel()
    for (const { client } of this.#channels) client.close()
  }

  calls<Service extends ServiceDefinition>(service: Service): Calls<Service> {
    const calls: Record<string, unknown> = {}
    for (const [name, method] of Object.entries(service.methods)) {
      const path = `/${service.fullName}/${method.name}`
      if (method.responseStream) {
        calls[name] = (request: unknown, options?: CallOptions) => this.#stream(path, method, request, options)
      } else {
        const call = (request: unknown, options?: CallOptions) => this.#unary(path, method, request, options)
        unaryMethods.set(call, `${method.name}Request`)
        calls[name] = call
      }
    }
    return calls as Calls<Service>
  }

  async #unary(path: string, method: Method, request: unknown, options: CallOptions = {}): Promise<unknown> {
    const { signal, timeoutMs = this.timeoutMs } = options
    const deadline = Date.now() + timeoutMs
    const metadata = await this.#metadata(options, timeoutMs)
    this.#throwIfEnded(signal)
    return await new Promise((resolve, reject) => {
      const call = this.#first.client.makeUnaryRequest(
        path,
        serializer(method),
        deserializer(method),
        method.requestType.fromPartial(request),
        metadata,
        { deadline },
        (error, response) => {
          release()
          if (error) reject(this.#failure(error, signal))
          else resolve(response)
        },
      )
      const release = this.#track(call, signal)
    })
  }

  #stream(
    path: string,
    method: Method,
    request: unknown,
    options: CallOptions = {},
  ): AsyncGenerator<unknown, void, void> {
    return leavable((signal) => this.#responses(path, method, request, { ...options, signal }), options.signal)
  }

  async *#responses(
    path: string,
    method: Method,
    request: unknown,
    options: CallOptions,
  ): AsyncGenerator<unknown, void, void> {
    const { signal, timeoutMs } = options
    const deadline = timeoutMs === undefined ? undefined : Date.now() + timeoutMs
    const metadata = await this.#metadata(options, timeoutMs)
    this.#throwIfEnded(signal)
    const channel = this.#channels.find(({ streams }) => streams < STREAMS_PER_CHANNEL) ?? this.#open()
    const duplex = method.requestStream
    const how = [path, serializer(method), deserializer(method)] as const
    const given = deadline === undefined ? {} : { deadline }
    const call = duplex
      ? channel.client.makeBidiStreamRequest(...how, metadata, given)
      : channel.client.makeServerStreamRequest(...how, method.requestType.fromPartial(request), metadata, given)
    channel.streams += 1
    call.on('error', () => {}) // The loop below throws it, unless it has ended already.
    const release = this.#track(call, signal)
    const ended = new AbortController()
    let failure: { error: unknown } | undefined
    if (duplex) {
      const requests = request as AsyncIterable<unknown> | Iterable<unknown>
      send(requests, call as ClientDuplexStream<unknown, unknown>, method, ended.signal).catch((error) => {
        if (ended.signal.aborted) return
        failure = { error }
        call.cancel()
      })
    }
    try {
      for await (const response of call) yield response
    } catch (error) {
      throw failure ? failure.error : this.#failure(error as ServiceError, signal)
    } finally {
      ended.abort()
      channel.streams -= 1
      release()
      call.cancel()
    }
  }

  async #metadata({ signal, metadata: given }: CallOptions, timeoutMs: number | undefined): Promise<Metadata> {
    signal?.throwIfAborted()
    const metadata = given?.clone() ?? new Metadata()
    if (this.#tenant !== undefined) metadata.set('x-tenant-id', this.#tenant)
    if (this.#token !== undefined) {
      const token = typeof this.#token === 'string' ? this.#token : await this.#newToken(this.#token, signal, timeoutMs)
      metadata.set('authorization', `Bearer ${token}`)
    }
    return metadata
  }

  /** What the function returns, unless the call ends before. */
  async #newToken(
    get: () => string | Promise<string>,
    signal: AbortSignal | undefined,
    timeoutMs: number | undefined,
  ): Promise<string> {
    const late = new AbortController()
    const fail = () =>
      late.abort(new ChatTicketError(status.DEADLINE_EXCEEDED, `token: its function took over ${timeoutMs} ms`))
    const timer = timeoutMs === undefined ? undefined : setTimeout(fail, Math.min(timeoutMs, MAX_TIMER_MS))
    try {
      const ends = [this.closing, late.signal]
      return sendable('token', await abortable(get(), AbortSignal.any(signal ? [signal, ...ends] : ends)))
    } finally {
      clearTimeout(timer)
    }
  }

  /** Throws if the call was ended while its metadata was awaited: no listener noticed that. */
  #throwIfEnded(signal: AbortSignal | undefined): void {
    signal?.throwIfAborted()
    this.closing.throwIfAborted()
  }

  #track(call: Cancellable, signal: AbortSignal | undefined): () => void {
    const cancel = () => call.cancel()
    this.#running.add(call)
    signal?.addEventListener('abort', cancel)
    return () => {
      this.#running.delete(call)
      signal?.removeEventListener('abort', cancel)
    }
  }

  #failure(error: ServiceError, signal: AbortSignal | undefined): unknown {
    if (signal?.aborted) return signal.reason
    if (this.closing.aborted) return this.closing.reason
    return fromServiceError(error)
  }
}

/**
 * An async generator that `return()` ends even while `next()` waits.
 *
 * A generator function alone would end only when what it awaits has settled.
 */
export function leavable<Item>(
  generate: (signal: AbortSignal) => AsyncGenerator<Item, void, void>,
  signal?: AbortSignal,
): AsyncGenerator<Item, void, void> {
  const left = new AbortController()
  const inner = generate(signal ? AbortSignal.any([signal, left.signal]) : left.signal)
  const generator = {
    next: async () => {
      try {
        return await inner.next()
      } catch (error) {
        if (error === left.signal.reason && left.signal.aborted) return { done: true as const, value: undefined }
        throw error
      }
    },
    return: async () => {
      left.abort()
      await inner.return()
      return { done: true as const, value: undefined }
    },
    throw: async (error: unknown) => {
      left.abort()
      await inner.return()
      throw error
    },
    [Symbol.asyncIterator]: () => generator,
  } as AsyncGenerator<Item, void, void>
  return generator
}

/** Sends requests, each when the one before has been passed on, until the call has ended. */
async function send(
  requests: AsyncIterable<unknown> | Iterable<unknown>,
  call: ClientDuplexStream<unknown, unknown>,
  method: Method,
  ended: AbortSignal,
): Promise<void> {
  for await (const request of requests) {
    if (ended.aborted) return
    if (!call.write(method.requestType.fromPartial(request))) await once(call, 'drain', { signal: ended })
  }
  call.end()
}

const serializer = (method: Method) => (request: unknown) => Buffer.from(method.requestType.encode(request).finish())

const deserializer = (method: Method) => (bytes: Buffer) => method.responseType.decode(bytes) as unknown

/** What a promise settles with, or the reason of a signal that is aborted before. */
async function abortable<Value>(promise: Value | Promise<Value>, signal: AbortSignal): Promise<Value> {
  signal.throwIfAborted()
  let abort = () => {}
  const aborted = new Promise<never>((_, reject) => {
    abort = () => reject(signal.reason)
    signal.addEventListener('abort', abort)
  })
  try {
    return await Promise.race([promise, aborted])
  } finally {
    signal.removeEventListener('abort', abort)
  }
}

/** Fails for text that gRPC would refuse without saying which value it is. */
function sendable(name: string, text: unknown): string {
  if (typeof text !== 'string') throw new TypeError(`${name}: ${typeof text}, must be a string`)
  if (!/^[\x20-\x7e]*$/.test(text)) {
    throw new TypeError(`${name}: not printable ASCII; does it end in a line break?`)
  }
  return text
}
