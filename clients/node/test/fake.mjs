// A fake server whose responses each test sets, and clients of it.
import { once } from 'node:events'

import { Metadata, Server, ServerCredentials, status } from '@grpc/grpc-js'
import {
  ChatAttachmentServiceService,
  ChatDraftServiceService,
  ChatMessageServiceService,
  ChatSessionServiceService,
  ChatTicketClient,
  ChatTicketServiceService,
} from 'chat-ticket-client'

import { Any } from '../dist/generated/google/protobuf/any.js'
import { ErrorInfo, RetryInfo } from '../dist/generated/google/rpc/error_details.js'
import { Status } from '../dist/generated/google/rpc/status.js'

/** A client of a server with these handlers, both of which end with the test. */
export async function serve(test, handlers, options = {}, serverOptions = {}) {
  const server = new Server(serverOptions)
  const all = new Proxy(handlers, { get: (_, name) => handlers[name] ?? unimplemented })
  server.addService(ChatSessionServiceService, all)
  server.addService(ChatMessageServiceService, all)
  server.addService(ChatDraftServiceService, all)
  server.addService(ChatAttachmentServiceService, all)
  server.addService(ChatTicketServiceService, all)
  const port = await new Promise((resolve, reject) => {
    server.bindAsync('127.0.0.1:0', ServerCredentials.createInsecure(), (error, bound) =>
      error ? reject(error) : resolve(bound),
    )
  })
  const client = new ChatTicketClient(`127.0.0.1:${port}`, { tenant: 'acme', ...options })
  test.after(() => {
    client.close()
    server.forceShutdown()
  })
  return client
}

const unimplemented = (call, callback) => {
  const error = { code: status.UNIMPLEMENTED, details: 'not in this test' }
  if (callback) callback(error)
  else call.emit('error', error)
}

export const pack = (name, type, value) =>
  Any.fromPartial({ typeUrl: `type.googleapis.com/${name}`, value: type.encode(type.fromPartial(value)).finish() })

/** An error as the service sends it. */
export function refusal(code, reason, { retrySeconds, details = [], message = 'no', packed, info = {} } = {}) {
  const all = [...details]
  if (reason) all.unshift(pack('google.rpc.ErrorInfo', ErrorInfo, { reason, domain: 'chat-ticket-svc', metadata: info }))
  if (retrySeconds !== undefined) {
    const seconds = Math.trunc(retrySeconds)
    const nanos = Math.round((retrySeconds - seconds) * 1e9)
    all.push(pack('google.rpc.RetryInfo', RetryInfo, { retryDelay: { seconds, nanos } }))
  }
  const metadata = new Metadata()
  const bytes = packed ?? Buffer.from(Status.encode(Status.fromPartial({ code, message, details: all })).finish())
  if (packed || all.length > 0) metadata.set('grpc-status-details-bin', bytes)
  return { code, details: message, metadata }
}

/**
 * A handler of WatchChatSession: each stream sends one script of responses, of which the last may
 * be an error, `end`, or `hold`. `requests` has what was asked for.
 */
export function scripted(...scripts) {
  const requests = []
  const streams = []
  const watchChatSession = (call) => {
    requests.push(call.request)
    streams.push(call)
    const script = scripts[requests.length - 1] ?? [refusal(status.INTERNAL, 'NO_MORE_SCRIPTS')]
    for (const step of script) {
      if (step === 'end') call.end()
      else if (step === 'hold') return
      else if (step.code !== undefined) call.emit('error', step)
      else call.write(step)
    }
  }
  return { watchChatSession, requests, streams }
}

export const BORN = new Date('2026-01-01T00:00:00.123Z')

export const session = (revision, fields = {}) => ({
  revision: BigInt(revision),
  event: {
    $case: 'session',
    value: {
      id: 'an id',
      tenantId: 'acme',
      status: 'CHAT_SESSION_STATUS_ACTIVE',
      hasTicket: false,
      revision: BigInt(revision),
      etag: '',
      createTime: BORN,
      updateTime: BORN,
      userId: '',
      title: '',
      labels: {},
      ...fields,
    },
  },
})
export const event = ($case, revision, value = {}) => ({ revision: BigInt(revision), event: { $case, value } })

export const deleted = (revision) => event('messageDeleted', revision, { messageId: `m${revision}` })

/** An event in short: its kind and its revision. */
export const brief = ({ event: { $case }, revision }) => `${$case} ${revision}`

/** All events of a watch that ends, or as many as `most`. */
export async function collect(watch, most = Infinity) {
  const found = []
  for await (const event of watch) {
    found.push(brief(event))
    if (found.length >= most) break
  }
  return found
}

/** Waits until a stream has ended at the server. */
export async function cancelled(stream) {
  if (!stream.cancelled) await once(stream, 'cancelled')
}
